"""The kinds of correction that are compared."""

from cat_plugin import CATConfig

PAPER_CLUSTERS = 64
OUTPUT_MODE, DEFAULT_MODE = "output", "layers"
MODES = {"plain_affine": "plain affine", "cat_paper": "paper", OUTPUT_MODE: "output", DEFAULT_MODE: "layers"}
"""Kinds of correction, and what they are called in tables. All but the last, the library's default, correct the output
alone, and can be fitted where nothing but logits is known."""
LOGITS_MODES = {mode: name for mode, name in MODES.items() if mode != DEFAULT_MODE}
EARLIER_NAMES = {"cat": OUTPUT_MODE}
"""Of modes, in rows that were stored before there was a correction of layers."""


def corrections(n_cat: int, seed: int) -> dict[str, CATConfig]:
    """The corrections that are fitted on `n_cat` images, the paper's only where they are enough for it."""
    return corrections_of_logits(n_cat, seed) | {DEFAULT_MODE: CATConfig(seed=seed)}


def corrections_of_logits(n_cat: int, seed: int) -> dict[str, CATConfig]:
    """Those that correct the output alone."""
    configs = {
        "plain_affine": CATConfig.paper(num_clusters=1, alpha=1.0, seed=seed),
        "cat_paper": CATConfig.paper(num_clusters=PAPER_CLUSTERS, seed=seed),
        OUTPUT_MODE: CATConfig(layers="none", seed=seed),
    }
    return {mode: config for mode, config in configs.items() if mode != "cat_paper" or n_cat >= PAPER_CLUSTERS}
