"""The default correction: maps of several families, weighed on held-out images against leaving the model alone.

The published recipe (one clustering, isolated clusters) needs more than ten thousand images. Here every map is a
deviation from a coarser one, as large as the data support, and the maps are averaged with weights that predict
images that they were not fitted on. Where held-out images show no gain, the identity is returned.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.decomposition import PCA
from torch import Tensor

from cat_plugin.config import CATConfig
from cat_plugin.correction.module import ClusterAffine
from cat_plugin.fitting.clustering import Clusters, cluster, one_cluster
from cat_plugin.fitting.criteria import CRITERIA, SOFTENED_KL, Criterion, best_scale, softened
from cat_plugin.fitting.divergence import cross_entropy, fit_class_divergence, fit_shared_divergence
from cat_plugin.fitting.least_squares import (
    AffineSums,
    DeviationSums,
    SharedSums,
    fit_affine,
    fit_deviations,
    fit_shared,
)
from cat_plugin.fitting.processes import ALONE, Processes
from cat_plugin.fitting.store import LogitStore
from cat_plugin.metrics import standard_error
from cat_plugin.running.positions import fold_of_rows

IDENTITY, AFFINE, SHARED = "identity", "affine", "low rank"
DIVERGENCE, SHARED_DIVERGENCE = "KL per class", "KL low rank"
CLUSTERS, SHARED_CLUSTERS, DIVERGENCE_CLUSTERS = "clusters", "low rank + clusters", "KL per class + clusters"
CLUSTERED = {CLUSTERS: AFFINE, SHARED_CLUSTERS: SHARED, DIVERGENCE_CLUSTERS: DIVERGENCE}
"""Families of cluster maps, and the shared map that they deviate from."""
WITH_FEATURES = " + features"

TRUSTED = (DIVERGENCE, SHARED_DIVERGENCE)
"""The families among which the weight is divided until held-out images say otherwise."""

CLUSTER_COUNTS = (4, 8, 16, 32, 64, 128)
MIN_IMAGES = 20
IMAGES_A_COMPONENT = 5
SOFTENING = 0.5
"""Temperature of the divergence as a share of the spread (std over classes) of full-precision logits: between
matching the largest logit (0) and matching all alike (infinity)."""
PRIOR, WEIGHT_PRIOR = 10.0, 20.0
"""Strengths of the pull of a divergence's parameters to 0, and of weights to those of the trusted families."""
MIN_AGREEMENT = -1.0
"""Held-out gain in agreement, in standard errors, below which the identity is returned, also where KL falls."""
SHARES = (1.0, 0.75, 0.5, 0.25)
"""Of the way from the quantized model to the average of the maps."""
MIN_CHANGED = 1.0
"""Percentage of predictions that a correction has to change to be worth having."""
SELECTION_VALUES = 2**21
"""Largest number of logits that families are compared on and divergences minimised on; with more images a part of them
is drawn."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A family of maps.

    kl_gain: by how much it lowers the held-out softened divergence, in nats, and kl_gain_error its standard error, as
    in `Evidence`; weight: its share in the correction.
    """

    name: str
    kl_gain: float
    kl_gain_error: float
    weight: float


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What held-out images say about a correction.

    images: how many there were (positions, where outputs have such). kl_gain: mean fall of the softened
    KL(FP || output), both at the scale that suits them best, in nats, whatever the criterion, and kl_gain_error its
    standard error. changed: percentage of predictions that the correction changes. accepted: whether it is used, and
    reason says why, by the criterion.
    """

    images: int
    kl_gain: float
    kl_gain_error: float
    changed: float
    accepted: bool
    reason: str
    candidates: tuple[Candidate, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Selected:
    """A correction, the evidence for it, and the images that it was judged on.

    images: how many it was fitted on, in all processes, and repeated: how many of them repeat another. q, f: (n, C)
    float64 logits of those it was judged on, and held_out: (n, C) float64, their corrected logits, each by maps that
    were fitted without it. owners: (n,) int64, the image of each, where all of these are positions of images.
    """

    correction: ClusterAffine
    evidence: Evidence
    images: int
    repeated: int
    q: Tensor
    f: Tensor
    held_out: Tensor
    owners: Tensor | None = None


def select(store: LogitStore, config: CATConfig, processes: Processes = ALONE) -> Selected:
    """Fits all families of maps, weighs them, and decides whether the result is worth having.

    The outcome does not depend on the order of the images, nor on which process has which. Images that repeat
    another one (in the outputs of both models, to about five digits) count once, since they would be held out and
    fitted at a time. Families are weighed, and divergences minimised, on up to `SELECTION_VALUES` logits; the
    least-squares statistics are those of all images, in passes that take memory for a part of them only. Positions
    of an image are samples like images, but are held out together, and standard errors are those over images.

    Args:
        store: logits (N, C) of both models, and features.
        config: its `num_clusters`, `pca_dim`, `min_cluster_size`, `alpha`, `criterion` and `seed` count.
        processes: that call this function, each with images of its own.
    """
    (q, f, h, owners), rows, repeated = _sample(store, config, processes)
    n_images = rows if owners is None else int(processes.sum(torch.tensor(store.num_images)))
    if min(rows, n_images) < MIN_IMAGES:
        reason = f"{min(rows, n_images)} images are too few to learn from and to check; give at least {MIN_IMAGES}"
        evidence = Evidence(0, 0.0, 0.0, 0.0, False, reason)
        return Selected(ClusterAffine.identity(store.classes), evidence, rows + repeated, repeated, q, f, q, owners)
    data = _Data.prepare(q, f, h, config, config.clusters_for(rows), owners)
    outputs = _cross_fit(data)
    weights = _temper(_weigh(outputs, data), outputs, data)
    held_out = sum(weight * outputs[name].double() for name, weight in weights.items())
    weights, evidence = processes.agree((weights, _judge(outputs, weights, held_out, data)))
    if not evidence.accepted:
        return Selected(ClusterAffine.identity(store.classes), evidence, rows + repeated, repeated, q, f, q, owners)
    names = {name for name, weight in weights.items() if weight > 0}
    maps = data.fit(torch.arange(len(q)), names) if len(q) == rows else _fit_all(store, data, names, processes)
    total = _combine([(weights[name], maps[name]) for name in weights if name in names])
    correction = processes.agree(data.correction(total, config.alpha))
    judged = q + config.alpha * (held_out - q)
    return Selected(correction, evidence, rows + repeated, repeated, q, f, judged, owners)


def _sample(
    store: LogitStore, config: CATConfig, processes: Processes
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None], int, int]:
    """The rows of all processes that families are compared on, `(q, f, h, owners)` in a random order; how many
    different ones there are; and how many repeat another.

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
    taken = [None if part is None else processes.gather_rows(part) for part in store.take(chosen[places] - before)]
    arranged = processes.gather_rows(places).argsort()
    q, f, h = (None if part is None else part[arranged] for part in taken)
    owners = store.images
    if owners is not None:
        owners = processes.gather_rows(owners + processes.rows_before(store.num_images))[chosen]
    return (q, f, h, owners), len(order), len(keys) - len(order)


@dataclasses.dataclass(frozen=True, eq=False)
class _Map:
    """`out = q * scale[ids] + shift[ids] + z @ mix`: scale and shift (K, C), mix (R, C), ids of the K clusters."""

    scale: Tensor
    shift: Tensor
    mix: Tensor
    clusters: int = 1

    def plus(self, slope: Tensor, offset: Tensor, clusters: int = 1) -> "_Map":
        return _Map(self.scale + slope, self.shift + offset, self.mix, clusters)

    def plus_mix(self, mix: Tensor, offset: Tensor) -> "_Map":
        wide = self.mix.clone()
        wide[: len(mix)] += mix
        return _Map(self.scale, self.shift + offset, wide, self.clusters)


@dataclasses.dataclass(frozen=True, eq=False)
class _Basis:
    """Whitened principal components `(x - mean) @ directions`, (N, R), of logits or features x (N, D)."""

    mean: Tensor
    directions: Tensor

    @classmethod
    def fit(cls, x: Tensor, limit: int, seed: int) -> "_Basis":
        if not torch.any(x != x[0]):
            return cls(x[0], x.new_zeros(x.shape[1], 0))
        pca = PCA(min(limit, x.shape[1], max(len(x) // IMAGES_A_COMPONENT, 1)), random_state=seed).fit(x.numpy())
        kept = pca.explained_variance_ > 1e-8 * max(pca.explained_variance_.max(), 1e-12)
        directions = (pca.components_[kept] / np.sqrt(pca.explained_variance_[kept])[:, None]).T
        return cls(torch.from_numpy(pca.mean_), torch.from_numpy(np.ascontiguousarray(directions)))

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.directions

    def unwhitened(self) -> np.ndarray:
        return (self.directions / self.directions.norm(dim=0)).numpy()


def _components(basis: _Basis, feature_basis: _Basis | None, q: Tensor, h: Tensor | None) -> Tensor:
    return basis(q) if h is None else torch.cat([basis(q), feature_basis(h)], dim=1)


@dataclasses.dataclass(frozen=True, eq=False)
class _Data:
    """Images with what all families share: principal components, clusterings, and the teacher's softened predictions.

    z: (N, R + S) components of the logits, then of the features. owners: as in `Selected`. seed: of the folds.
    """

    q: Tensor
    f: Tensor
    z: Tensor
    basis: _Basis
    feature_basis: _Basis | None
    clusterings: dict[int, Clusters]
    temperature: float
    teacher: Tensor
    owners: Tensor | None
    seed: int
    criterion: Criterion

    @classmethod
    def prepare(
        cls, q: Tensor, f: Tensor, h: Tensor | None, config: CATConfig, max_clusters: int, owners: Tensor | None = None
    ) -> "_Data":
        basis = _Basis.fit(q, config.pca_dim, config.seed)
        feature_basis = None if h is None else _Basis.fit(h, config.pca_dim, config.seed)
        z = _components(basis, feature_basis, q, h)
        clusterings = {1: one_cluster(*q.shape)}
        limit = min(max_clusters, len(q) // 2) if len(basis.directions.T) else 1
        for count in CLUSTER_COUNTS:
            if count <= limit:
                clusterings[count] = cluster(q.numpy(), basis.mean.numpy(), basis.unwhitened(), count, config.seed)
        temperature = SOFTENING * max(f.std(dim=1).mean().item(), 1e-6) if q.shape[1] > 1 else 1.0
        shared = q, f, z, basis, feature_basis, clusterings, temperature, softened(f, temperature)
        return cls(*shared, owners, config.seed, CRITERIA[config.criterion])

    @property
    def rank(self) -> int:
        """Components of the logits."""
        return self.basis.directions.shape[1]

    def fit(self, rows: Tensor, wanted: set[str] | None = None) -> dict[str, _Map]:
        """Maps of all families, or of those in `wanted` and what they deviate from, from the images `rows` (n,)."""
        maps = self.fit_shared_maps(rows, wanted)
        for count in self.clusterings:
            maps |= self.fit_cluster_maps(rows, maps, count, wanted)
        return maps

    def fit_shared_maps(self, rows: Tensor, wanted: set[str] | None = None) -> dict[str, _Map]:
        """Maps without clusters."""
        q, f, z = self.q[rows], self.f[rows], self.z[rows]
        maps = {IDENTITY: self.identity(), AFFINE: self.affine(*fit_affine(q, f, torch.zeros_like(rows), 1))}
        for suffix, width in self.widths.items():
            shared = fit_shared(z[:, :width], f - self.output(maps[AFFINE], q, z))
            maps[SHARED + suffix] = maps[AFFINE].plus_mix(*shared)
        return maps | self.fit_divergences(rows, maps, wanted)

    def fit_divergences(self, rows: Tensor, maps: dict[str, _Map], wanted: set[str] | None) -> dict[str, _Map]:
        """Maps that minimise divergences, the low-rank ones starting from those in `maps`."""
        q, z, teacher = self.q[rows], self.z[rows], self.teacher[rows]
        found = {}
        if wanted is None or any(name.startswith(DIVERGENCE) for name in wanted):
            scale, shift = fit_class_divergence(q, teacher, self.temperature, PRIOR)
            found[DIVERGENCE] = self.affine(scale.unsqueeze(0), shift.unsqueeze(0))
        for suffix, width in self.widths.items():
            if wanted is None or SHARED_DIVERGENCE + suffix in wanted:
                shared = maps[SHARED + suffix]
                ones = torch.cat([z[:, :width], z.new_ones(len(z), 1)], dim=1)
                start = self.output(shared, q, z)
                coefficients = fit_shared_divergence(ones, start, teacher, self.temperature, PRIOR)
                found[SHARED_DIVERGENCE + suffix] = shared.plus_mix(coefficients[:-1], coefficients[-1])
        return found

    def fit_cluster_maps(
        self, rows: Tensor, maps: dict[str, _Map], count: int, wanted: set[str] | None = None
    ) -> dict[str, _Map]:
        """Maps with `count` clusters, deviating from those in `maps`."""
        if count == 1:
            return {}
        q, f, z, ids = self.q[rows], self.f[rows], self.z[rows], self.clusterings[count].ids[rows]
        found = {}
        for name, parent in CLUSTERED.items():
            if wanted is None or _with_count(name, count) in wanted:
                residual = f - self.output(maps[parent], q, z)
                # Least squares would flatten the slope of a divergence's map, see `fit_deviations`.
                deviations = fit_deviations(q, residual, ids, count, keep_slope=parent == DIVERGENCE)
                found[_with_count(name, count)] = maps[parent].plus(*deviations, count)
        return found

    @property
    def widths(self) -> dict[str, int]:
        """Number of components that low-rank maps read, by the ending of their name."""
        logits = {"": self.rank}
        return logits if self.feature_basis is None else {**logits, WITH_FEATURES: self.z.shape[1]}

    def affine(self, scale: Tensor, shift: Tensor) -> _Map:
        """The map without a low-rank part; scale and shift are (1, C)."""
        return _Map(scale, shift, self.z.new_zeros(self.z.shape[1], self.q.shape[1]))

    def identity(self) -> _Map:
        ones = torch.ones(1, self.q.shape[1], dtype=torch.float64)
        return self.affine(ones, torch.zeros_like(ones))

    def components(self, q: Tensor, h: Tensor | None) -> Tensor:
        """(n, R + S) components of other images' logits and features."""
        return _components(self.basis, self.feature_basis, q, h)

    @staticmethod
    def output(affine_map: _Map, q: Tensor, z: Tensor) -> Tensor:
        """Output (n, C) of a map without clusters for logits `q` and components `z`."""
        return q * affine_map.scale + affine_map.shift + z @ affine_map.mix

    def apply(self, affine_map: _Map, rows: Tensor) -> Tensor:
        """Output (n, C) of a map for the images `rows` (n,)."""
        ids = self.clusterings[affine_map.clusters].ids[rows]
        return self.q[rows] * affine_map.scale[ids] + affine_map.shift[ids] + self.z[rows] @ affine_map.mix

    def correction(self, total: _Map, alpha: float) -> ClusterAffine:
        """The module that moves by `alpha` towards the output of `total`."""
        clusters = self.clusterings[total.clusters]
        mix, feature_mix = total.mix[: self.rank], total.mix[self.rank :]
        shift = total.shift - self.basis.mean @ self.basis.directions @ mix
        parts: dict[str, Tensor] = {}
        if mix.any():
            parts = {"project": self.basis.directions, "mix": alpha * mix}
        if self.feature_basis is not None and feature_mix.any():
            feature_mix = self.feature_basis.directions @ feature_mix
            shift = shift - self.feature_basis.mean @ feature_mix
            parts["feature_mix"] = alpha * feature_mix
        return ClusterAffine(clusters.weight, clusters.bias, 1 + alpha * (total.scale - 1), alpha * shift, **parts)


def _with_count(name: str, count: int) -> str:
    return f"{name}, K={count}"


def _cross_fit(data: _Data) -> dict[str, Tensor]:
    """(N, C) float32 outputs of every family, each image by a map that was fitted without it.

    Of the clusterings, only the one that brings a family nearest to full precision, by the criterion at temperature 1,
    is kept. The components and clusterings are those of all images, which says nothing of their full-precision logits.
    Few images are cut into more parts, so that the maps judged are nearly those of all images.
    """
    n_rows = len(data.q)
    folds = 10 if n_rows <= 512 else 5
    if data.owners is None:
        parts = [torch.arange(fold, n_rows, folds) for fold in range(folds)]
    else:
        fold_of = fold_of_rows(data.owners, folds, data.seed)
        parts = [(fold_of == fold).nonzero().squeeze(1) for fold in range(folds)]
    others = [torch.cat([part for part in parts if part is not held_out]).sort().values for held_out in parts]
    maps = [data.fit_shared_maps(rows) for rows in others]

    def outputs_of(fold_maps: list[dict[str, _Map]]) -> dict[str, Tensor]:
        outputs = {name: torch.empty(data.q.shape, dtype=torch.float32) for name in fold_maps[0]}
        for held_out, found in zip(parts, fold_maps, strict=True):
            for name, affine_map in found.items():
                outputs[name][held_out] = data.apply(affine_map, held_out).float()
        return outputs

    best, best_value, target = {}, math.inf, data.criterion.target(data.f, 1.0)
    for count in data.clusterings:
        if count > 1:
            folded = zip(others, maps, strict=True)
            outputs = outputs_of([data.fit_cluster_maps(rows, found, count) for rows, found in folded])
            value = min(data.criterion.loss(out.double(), target, 1.0).mean().item() for out in outputs.values())
            if value < best_value:
                best, best_value = outputs, value
    return outputs_of(maps) | best


def _fit_all(store: LogitStore, data: _Data, names: set[str], processes: Processes) -> dict[str, _Map]:
    """The maps `names`, least squares on all images of all processes, divergences on those of `data`."""
    rows, classes = torch.arange(len(data.q)), store.classes
    affine = AffineSums(data.q.mean(dim=0), data.f.mean(dim=0))
    for q, f, _ in store.chunks():
        affine.add(q, f)
    affine.sums = processes.sum(affine.sums)
    maps = {IDENTITY: data.identity(), AFFINE: data.affine(*affine.solve())}

    shared = {suffix: SharedSums(width, classes) for suffix, width in data.widths.items()}
    for q, f, h in store.chunks():
        z = data.components(q, h)
        for suffix, sums in shared.items():
            sums.add(z[:, : data.widths[suffix]], f - data.output(maps[AFFINE], q, z))
    for suffix, sums in shared.items():
        sums.sums, sums.power = processes.sum(sums.sums), processes.sum(sums.power)
        maps[SHARED + suffix] = maps[AFFINE].plus_mix(*sums.solve())
    maps |= data.fit_divergences(rows, maps, names)

    counts = {count for count in data.clusterings for name in CLUSTERED if _with_count(name, count) in names}
    for count in counts:
        clusters = data.clusterings[count]
        clustered = {name: DeviationSums(count, data.q.mean(dim=0)) for name in CLUSTERED if CLUSTERED[name] in maps}
        for q, f, h in store.chunks():
            z, ids = data.components(q, h), (q @ clusters.weight + clusters.bias).argmax(dim=1)
            for name, sums in clustered.items():
                sums.add(q, f - data.output(maps[CLUSTERED[name]], q, z), ids)
        for name, sums in clustered.items():
            sums.counts, sums.sums = processes.sum(sums.counts), processes.sum(sums.sums)
            deviations = sums.solve(keep_slope=CLUSTERED[name] == DIVERGENCE)
            maps[_with_count(name, count)] = maps[CLUSTERED[name]].plus(*deviations, count)
    return maps


def _weigh(outputs: dict[str, Tensor], data: _Data) -> dict[str, float]:
    """Non-negative weights of the families that minimise the held-out KL(FP || output) of their sum.

    Away from equal shares for the trusted families, weights are pulled back: few images cannot tell families apart.
    """
    names = list(outputs)
    stacked = torch.empty(len(names), *data.q.shape, dtype=torch.float64)
    for part, output in zip(stacked, outputs.values(), strict=True):
        torch.sub(output, output.mean(dim=1, keepdim=True), out=part)
    teacher = data.f.softmax(dim=1)
    trusted = np.array([float(name in TRUSTED) for name in names])
    trusted /= trusted.sum()
    mean = torch.einsum("m,mnc->nc", torch.from_numpy(trusted), stacked)
    scale = best_scale(mean, teacher)
    penalty = WEIGHT_PRIOR * _dispersion(stacked, (scale * mean).softmax(dim=1), teacher) / len(data.q)

    def value_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = cross_entropy(torch.einsum("m,mnc->nc", torch.from_numpy(weights), stacked), teacher)
        gradient = torch.einsum("mnc,nc->m", stacked, slope).numpy()
        away = weights / scale - trusted
        return value.item() + penalty * (away**2).sum(), gradient + 2 * penalty / scale * away

    found = minimize(value_and_gradient, scale * trusted, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(names))
    return {name: float(weight) for name, weight in zip(names, found.x, strict=True)}


def _temper(weights: dict[str, float], outputs: dict[str, Tensor], data: _Data) -> dict[str, float]:
    """`weights`, moved towards the identity as far as held-out images ask by the criterion, in steps of a quarter.

    Few images give a direction sooner than a distance.
    """
    total = sum(weights.values())
    output = sum(weight * outputs[name].double() for name, weight in weights.items())
    plain, target = total * data.q, data.criterion.target(data.f, data.temperature)

    def loss(share: float) -> float:
        return data.criterion.loss(plain + share * (output - plain), target, data.temperature).mean().item()

    share = min(SHARES, key=loss)
    tempered = {name: share * weight for name, weight in weights.items()}
    tempered[IDENTITY] += (1 - share) * total
    return tempered


def _dispersion(stacked: Tensor, predicted: Tensor, teacher: Tensor) -> float:
    """Variance of the slope of an image's divergence by the weights, relative to its curvature.

    1 where targets are drawn from the predictions; less where the teacher's soft predictions tell more than a label.
    """
    variance = curvature = 0.0
    for part in stacked:
        weighted = predicted * part
        mean = weighted.sum(dim=1)
        variance += (mean - (teacher * part).sum(dim=1)).var().item()
        curvature += ((weighted * part).sum(dim=1) - mean.square()).mean().item()
    return min(variance / max(curvature, 1e-12), 1.0)


def _judge(outputs: dict[str, Tensor], weights: dict[str, float], held_out: Tensor, data: _Data) -> Evidence:
    total = sum(weights.values())
    softened_kl = _falls(SOFTENED_KL, data)
    candidates = tuple(
        Candidate(name, *softened_kl(output.double()), weights[name] / total if total else 0.0)
        for name, output in outputs.items()
    )
    criterion, kl = data.criterion, softened_kl(held_out)
    fall, error = kl if criterion.loss is SOFTENED_KL.loss else _falls(criterion, data)(held_out)
    target, before, after = (logits.argmax(dim=1) for logits in (data.f, data.q, held_out))
    changed = 100.0 * (after != before).double().mean().item()
    won, lost = int(((after == target) & (before != target)).sum()), int(((before == target) & (after != target)).sum())
    spread = math.sqrt(won + lost)
    if data.owners is not None:
        net = (after == target).double() - (before == target).double()
        spread = standard_error(net, data.owners) * len(net)
    faults = {
        criterion.change(fall, error): not fall > 0,
        f"{won} predictions come to agree with FP, and {lost} no longer do": won - lost < MIN_AGREEMENT * spread,
        f"a correction would change {changed:.2f} % of the predictions": changed < MIN_CHANGED,
    }
    found = [fault for fault, given in faults.items() if given]
    accepted = not (found and criterion.demanded)
    said = "; ".join(found or list(faults)[:2])
    verdict = "" if accepted and not found else "no evidence was demanded: " if accepted else "nothing to gain: "
    reason = f"{verdict}on held-out images, {said}"
    return Evidence(len(data.q), *kl, changed, accepted, reason, candidates)


def _falls(criterion: Criterion, data: _Data) -> Callable[[Tensor], tuple[float, float]]:
    """A function of logits (N, C): by how much their loss is below the quantized model's, and its standard error."""
    target = criterion.target(data.f, data.temperature)
    plain = criterion.loss(data.q, target, data.temperature)

    def fall(output: Tensor) -> tuple[float, float]:
        falls = plain - criterion.loss(output, target, data.temperature)
        return falls.mean().item(), standard_error(falls, data.owners)

    return fall


def _combine(parts: list[tuple[float, _Map]]) -> _Map:
    """The weighted sum of maps, of which those with clusters share one clustering."""
    clusters = max(part.clusters for _, part in parts)
    scale, shift = (
        sum(weight * getattr(part, name).expand(clusters, -1) for weight, part in parts) for name in ("scale", "shift")
    )
    return _Map(scale, shift, sum(weight * part.mix for weight, part in parts), clusters)
