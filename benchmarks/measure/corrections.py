"""The kinds of correction that are compared."""

from cat_plugin import CATConfig

PAPER_CLUSTERS = 64
DEFAULT_MODE = "cat"
MODES = {"plain_affine": "plain affine", "cat_paper": "CAT (paper)", DEFAULT_MODE: "CAT"}
"""Kinds of correction, and what they are called in tables."""


def corrections(n_cat: int, seed: int) -> dict[str, CATConfig]:
    """The corrections that are fitted on `n_cat` images, the paper's only where they are enough for it."""
    configs = {
        "plain_affine": CATConfig.paper(num_clusters=1, alpha=1.0, seed=seed),
        "cat_paper": CATConfig.paper(num_clusters=PAPER_CLUSTERS, seed=seed),
        DEFAULT_MODE: CATConfig(seed=seed),
    }
    return {mode: config for mode, config in configs.items() if mode != "cat_paper" or n_cat >= PAPER_CLUSTERS}
