"""The default correction: maps of several families, weighed on held-out images against leaving the model alone.

The published recipe (one clustering, isolated clusters) needs more than ten thousand images. Here every map is a
deviation from a coarser one, as large as the data support, and the maps are averaged with weights that predict
images that they were not fitted on. Where held-out images show no gain, the identity is returned.
"""

import dataclasses

import torch
from torch import Tensor

from cat_plugin.config import CATConfig
from cat_plugin.correction.module import ClusterAffine
from cat_plugin.fitting.evidence import Evidence, judge
from cat_plugin.fitting.families import AffineMap, Shared, fit_maps
from cat_plugin.fitting.least_squares import effective_share
from cat_plugin.fitting.processes import ALONE, Processes
from cat_plugin.fitting.store import LogitStore, different_images
from cat_plugin.fitting.weights import Sample, cross_fit, mixed, temper, weigh

MIN_IMAGES = 20
SELECTION_VALUES = 2**21
"""Largest number of logits that families are compared on and divergences minimised on; with more images a part of them
is drawn."""


@dataclasses.dataclass(frozen=True, eq=False)
class Selected:
    """A correction, the evidence for it, and the images that it was judged on.

    images: how many it was fitted on, in all processes; rows: how many positions they have; repeated: how many of the
    images repeat another. q, f: (n, C) float64 logits of those it was judged on, and corrected: (n, C) float64, their
    corrected logits, each by maps that were fitted without it. owners: (n,) int64, the image of each, where all of
    these are positions of images.
    """

    correction: ClusterAffine
    evidence: Evidence
    images: int
    rows: int
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
    least-squares statistics are those of all images, in passes that take memory for a part of them only. Positions of
    an image are held out together, count as many samples as they are worth (`effective_share`), and standard errors are
    those over images. What is judged is what will be attached, `alpha` included.

    Args:
        store: logits (N, C) of both models.
        config: its `num_clusters`, `pca_dim`, `alpha` and `seed` count.
        processes: that call this function, each with images of its own.
    """
    drawn = draw(store, config, processes)
    q, f, owners = drawn.q, drawn.f, drawn.owners

    def leave_alone(evidence: Evidence) -> Selected:
        identity = ClusterAffine.identity(store.classes)
        return Selected(identity, evidence, drawn.images, drawn.rows, drawn.repeated, q, f, q, owners)

    distinct = drawn.images - drawn.repeated
    if distinct < MIN_IMAGES:
        kind = "different images" if drawn.repeated else "images"
        reason = f"{distinct} {kind} are too few to learn from and to check; give at least {MIN_IMAGES}"
        return leave_alone(Evidence(0, 0.0, 0.0, 0.0, False, reason))
    shared = Shared.of(q, f, config, effective_share(q, f, owners))
    sample = Sample(shared.rows(q, f), owners, shared, config.seed)
    sample, outputs = cross_fit(sample)
    shared = sample.shared
    weights = temper(weigh(outputs, sample), outputs, sample)
    corrected = q + config.alpha * (mixed(weights, outputs) - q)
    weights, evidence = processes.agree((weights, judge(outputs, weights, corrected, sample, config.alpha)))
    if not evidence.accepted:
        return leave_alone(evidence)
    used = [family for family, weight in weights.items() if weight > 0]
    if drawn.complete:
        maps = fit_maps(used, shared, sample.rows)
    else:
        maps = fit_maps(used, shared, sample.rows, lambda: (shared.rows(*part) for part in store.chunks()), processes)
    total = AffineMap.combined((weights[family], maps[family]) for family in used)
    correction = processes.agree(shared.correction(total, config.alpha))
    return Selected(correction, evidence, drawn.images, drawn.rows, drawn.repeated, q, f, corrected, owners)


@dataclasses.dataclass(frozen=True, eq=False)
class JudgedRows:
    """Different images of all processes, in an order that does not depend on how they came.

    complete: whether these are all different ones. images, rows, repeated: as in `Selected`.
    """

    q: Tensor
    f: Tensor
    owners: Tensor | None
    complete: bool
    images: int
    rows: int
    repeated: int


def draw(store: LogitStore, config: CATConfig, processes: Processes) -> JudgedRows:
    """A random order of sorted images, as many as `SELECTION_VALUES` allows, the same in all processes."""
    keys, counts = processes.gather_rows(store.keys()), processes.gather_rows(store.rows_per_image())
    distinct = different_images(keys)
    generator = torch.Generator("cpu").manual_seed(config.seed)
    chosen = distinct[torch.randperm(len(distinct), generator=generator, device="cpu")]
    fits = counts[chosen].cumsum(0) <= SELECTION_VALUES // store.classes
    fits[:MIN_IMAGES] = True
    chosen = chosen[fits]
    before = processes.before(store.num_images)
    places = ((chosen >= before) & (chosen < before + store.num_images)).nonzero().squeeze(1)
    rows, owners = store.rows_of(chosen[places] - before)
    taken = [processes.gather_rows(part) for part in (*store.take(rows), places[owners])]
    arranged = taken[-1].argsort(stable=True)
    q, f, owners = (part[arranged] for part in taken)
    return JudgedRows(
        q,
        f,
        None if store.images is None else owners,
        len(chosen) == len(distinct),
        len(keys),
        int(counts.sum()),
        len(keys) - len(distinct),
    )
