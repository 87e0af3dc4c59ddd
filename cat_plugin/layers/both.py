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
from cat_plugin.metrics import decimals

MODEL, OUTPUT = "the model as it is", "the output corrected alone"


def fit_both_levels(
    quantized_model: nn.Module,
    fp_model: nn.Module,
    kept: KeptImages | None,
    store: LogitStore,
    config: CATConfig,
    processes: Processes,
    **how: Any,
) -> tuple[Fit, LayersFit | None, LogitStore]:
    """The correction of the output, those of layers, None where these are not to be looked at, and the outputs that the
    first was fitted on.

    Layers are used where their outputs on held-out images are nearer to full precision than those of the model as it
    is, by a margin beyond chance, and where both levels together come nearer than the output corrected alone. The
    correction of the output is then fitted on such outputs, and the scores of both together are on images that neither
    level was fitted on.

    Args:
        kept: the images of this process, and store: outputs of both models for all images; kept ones come first.
        how: options of `fit_layers`.
    """
    if kept is None:
        return fit_and_score(store, config, processes), None, store
    complete = all(processes.gather(len(kept) == store.num_images))
    known = store if complete else store.first(len(kept))
    alone = fit_and_score(known, config, processes)
    distinct = len(different_images(processes.gather_rows(known.keys())))
    least = MIN_IMAGES if config.layers == AUTO else 2
    if distinct < least:
        layers = left_alone(f"{distinct} different images are too few for layers; give at least {least}")
    else:
        layers = fit_layers(quantized_model, fp_model, kept, known, config, processes, **how)
    if layers.evidence.accepted:
        inside = known.with_outputs(layers.held_out)
        together, layers = _judged(alone, layers, inside, config, processes)
        if layers.evidence.accepted:
            return together, layers, inside
    return alone if complete else fit_and_score(store, config, processes), layers, store


def _judged(
    alone: Fit, layers: LayersFit, inside: LogitStore, config: CATConfig, processes: Processes
) -> tuple[Fit | None, LayersFit]:
    """The correction of the output after that of layers, and these, as far as held-out images speak for them.

    alone: the correction of the output without them; inside: held-out outputs with corrected layers.
    """
    q, f, owners, kind = alone.q, alone.f, alone.owners, config.kind
    outputs = {"plain": q, "output": _either(alone.out, q)}
    outputs["inside"] = judged_outputs(inside, config, processes).to(q.dtype)
    against = [f"against {MODEL}, {each}" for each in faults(kind, f, outputs["inside"], q, owners, margin=True)]
    together = None
    if not processes.agree(against):
        together = fit_and_score(inside, config, processes)
        outputs["both"] = _either(together.out, together.q)
        worse = faults(kind, f, outputs["both"], outputs["output"], owners, margin=False)
        against = [f"against {OUTPUT}, {each}" for each in worse]
    against = processes.agree(against)
    known = {name: Closeness.of(f, out, kind) for name, out in outputs.items()}
    if against:
        reason = f"nothing to gain: {'; '.join(against)}"
        return None, LayersFit({}, dataclasses.replace(layers.evidence, accepted=False, reason=reason, **known))
    fall = known["plain"].divergence - known["inside"].divergence
    reason = f"on held-out images, the divergence falls by {decimals(fall)}"
    scores = score(kind, f, q, outputs["both"], owners)
    evidence = dataclasses.replace(layers.evidence, reason=reason, **known)
    return dataclasses.replace(together, scores=scores), dataclasses.replace(layers, evidence=evidence)


def _either(out: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if out is None else out
