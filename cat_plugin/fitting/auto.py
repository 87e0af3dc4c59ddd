"""The default correction: maps of several families, weighed on held-out images against leaving the model alone.

The published recipe (one clustering, isolated clusters) needs more than ten thousand images. Here every map is a
deviation from a coarser one, as large as the data support, and the maps are averaged with weights that predict
images that they were not fitted on. Where held-out images show no gain, the identity is returned.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from cat_plugin.config import CATConfig
from cat_plugin.correction.module import ClusterAffine
from cat_plugin.fitting.evidence import Evidence, judge
from cat_plugin.fitting.families import AffineMap, Shared, fit_maps
from cat_plugin.fitting.processes import ALONE, Processes
from cat_plugin.fitting.store import LogitStore
from cat_plugin.fitting.weights import Sample, cross_fit, mixed, temper, weigh

MIN_IMAGES = 20
SELECTION_VALUES = 2**21
"""Largest number of logits that families are compared on and divergences minimised on; with more images a part of them
is drawn."""


@dataclasses.dataclass(frozen=True, eq=False)
class Selected:
    """A correction, the evidence for it, and the images that it was judged on.

    images: how many it was fitted on, in all processes, and repeated: how many of them repeat another. q, f: (n, C)
    float64 logits of those it was judged on, and corrected: (n, C) float64, their corrected logits, each by maps that
    were fitted without it. owners: (n,) int64, the image of each, where all of these are positions of images.
    """

    correction: ClusterAffine
    evidence: Evidence
    images: int
    repeated: int
    q: Tensor
    f: Tensor
    corrected: Tensor
    owners: Tensor | None = None


def select(store: LogitStore, config: CATConfig, processes: Processes = ALONE) -> Selected:
    """Fits all families of maps, weighs them, and decides whether the result is worth having.

    The outcome does not depend on the order of the images, nor on which process has which. Images that repeat
    another one (in the outputs of both models, to about five digits) count once, since they would be held out and
    fitted at a time. Families are weighed, and divergences minimised, on up to `SELECTION_VALUES` logits; the
    least-squares statistics are those of all images, in passes that take memory for a part of them only. Positions
    of an image are samples like images, but are held out together, and standard errors are those over images.

    Args:
        store: logits (N, C) of both models.
        config: its `num_clusters`, `pca_dim`, `alpha` and `seed` count.
        processes: that call this function, each with images of its own.
    """
    (q, f, owners), rows, repeated = _sample(store, config, processes)
    n_images = rows if owners is None else int(processes.sum(torch.tensor(store.num_images)))

    def leave_alone(evidence: Evidence) -> Selected:
        identity = ClusterAffine.identity(store.classes)
        return Selected(identity, evidence, rows + repeated, repeated, q, f, q, owners)

    if min(rows, n_images) < MIN_IMAGES:
        reason = f"{min(rows, n_images)} images are too few to learn from and to check; give at least {MIN_IMAGES}"
        return leave_alone(Evidence(0, 0.0, 0.0, 0.0, False, reason))
    shared = Shared.of(q, f, config)
    sample = Sample(shared.rows(q, f), owners, shared, config.seed)
    outputs = cross_fit(sample)
    weights = temper(weigh(outputs, sample), outputs, sample)
    held_out = mixed(weights, outputs)
    weights, evidence = processes.agree((weights, judge(outputs, weights, held_out, sample)))
    if not evidence.accepted:
        return leave_alone(evidence)
    used = [family for family, weight in weights.items() if weight > 0]
    if len(q) == rows:  # of all processes
        maps = fit_maps(used, shared, sample.rows)
    else:
        maps = fit_maps(used, shared, sample.rows, lambda: (shared.rows(*part) for part in store.chunks()), processes)
    total = AffineMap.combined((weights[family], maps[family]) for family in used)
    correction = processes.agree(shared.correction(total, config.alpha))
    judged = q + config.alpha * (held_out - q)
    return Selected(correction, evidence, rows + repeated, repeated, q, f, judged, owners)


def _sample(
    store: LogitStore, config: CATConfig, processes: Processes
) -> tuple[tuple[Tensor, Tensor, Tensor | None], int, int]:
    """The rows of all processes that families are compared on, `(q, f, owners)` in a random order; how many different
    ones there are; and how many repeat another.

    The random order is one of sorted images, so that it does not depend on how they came.
    """
    keys = processes.gather_rows(store.keys())
    order = torch.from_numpy(np.lexsort(keys.T.flip(0).numpy()))
    repeats = (keys[order].diff(dim=0).abs() <= 1e-5 * keys.abs().mean(dim=0)).all(dim=1)
    order = order[torch.cat([torch.ones(min(len(keys), 1), dtype=torch.bool), ~repeats])]
    chosen = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(config.seed))]
    chosen = chosen[: max(SELECTION_VALUES // store.classes, MIN_IMAGES)]
    before = processes.rows_before(len(store))
    places = ((chosen >= before) & (chosen < before + len(store))).nonzero().squeeze(1)
    taken = [processes.gather_rows(part) for part in store.take(chosen[places] - before)]
    arranged = processes.gather_rows(places).argsort()
    q, f = (part[arranged] for part in taken)
    owners = store.images
    if owners is not None:
        owners = processes.gather_rows(owners + processes.rows_before(store.num_images))[chosen]
    return (q, f, owners), len(order), len(keys) - len(order)
