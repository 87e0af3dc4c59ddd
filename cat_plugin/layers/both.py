"""Both levels: layers inside the network, then its output, each where held-out images show a gain."""

import dataclasses
from typing import Any

from torch import Tensor, nn

from cat_plugin.config import AUTO, CATConfig
from cat_plugin.fitting.fit import Fit, fit_and_score, judged_outputs
from cat_plugin.fitting.processes import Processes
from cat_plugin.fitting.scores import score
from cat_plugin.fitting.store import LogitStore, different_images
from cat_plugin.layers.evidence import Closeness, faults
from cat_plugin.layers.fit import MIN_IMAGES, LayersFit, fit_layers, left_alone
from cat_plugin.layers.images import KeptImages

MODEL, OUTPUT = "the model as it is", "its output corrected"


def fit_both_levels(
    quantized_model: nn.Module,
    fp_model: nn.Module,
    kept: KeptImages | None,
    store: LogitStore,
    config: CATConfig,
    processes: Processes,
    **how: Any,
) -> tuple[Fit, LayersFit | None]:
    """The correction of the output, and those of layers; None where layers are not to be looked at.

    Layers are used where their outputs on held-out images are nearer to full precision than those of the model as it
    is, and than those with the output corrected alone. The correction of the output is then fitted on such outputs, and
    the scores of both together are on images that neither level was fitted on.

    Args:
        kept: the images of this process, and store: outputs of both models for all images; kept ones come first.
        how: options of `fit_layers`.
    """
    if kept is None:
        return fit_and_score(store, config, processes), None
    known = store if len(kept) == store.num_images else store.first(len(kept))
    alone = fit_and_score(known, config, processes)
    distinct = len(different_images(processes.gather_rows(known.keys())))
    if config.layers == AUTO and distinct < MIN_IMAGES:
        layers = left_alone(f"{distinct} different images are too few for layers; give at least {MIN_IMAGES}")
    else:
        layers = fit_layers(quantized_model, fp_model, kept, known, config, processes, **how)
    if layers.evidence.accepted:
        inside = known.with_outputs(layers.held_out)
        together, layers = _judged(alone, layers, inside, config, processes)
        if layers.evidence.accepted:
            return together, layers
    return alone if known is store else fit_and_score(store, config, processes), layers


def _judged(
    alone: Fit, layers: LayersFit, inside: LogitStore, config: CATConfig, processes: Processes
) -> tuple[Fit | None, LayersFit]:
    """The correction of the output after that of layers, and these, as far as held-out images speak for them.

    alone: the correction of the output without them; inside: held-out outputs with corrected layers.
    """
    q, f, owners, kind = alone.q, alone.f, alone.owners, config.kind
    outputs = {"plain": q, "output": q if alone.out is None else alone.out}
    outputs["inside"] = judged_outputs(inside, config, processes).to(q.dtype)
    speaking = faults(kind, f, outputs["inside"], {MODEL: q, OUTPUT: outputs["output"]}, owners)
    speaking = processes.agree(speaking)
    together = None if speaking else fit_and_score(inside, config, processes)
    if together is not None and together.out is not None:
        outputs["both"] = together.out
    known = {name: Closeness.of(f, out, kind) for name, out in outputs.items()}
    evidence = dataclasses.replace(layers.evidence, **known)
    if speaking:
        evidence = dataclasses.replace(evidence, accepted=False, reason=f"nothing to gain: {'; '.join(speaking)}")
        return None, LayersFit({}, evidence)
    gained = known["plain"].divergence - known["inside"].divergence
    evidence = dataclasses.replace(evidence, reason=f"on held-out images, the divergence falls by {gained:.4f}")
    out = _either(together.out, together.q)
    scores = score(kind, f, q, out, owners)
    return dataclasses.replace(together, scores=scores), dataclasses.replace(layers, evidence=evidence)


def _either(out: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if out is None else out
