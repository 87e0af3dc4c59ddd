"""The default correction: maps of several families, weighed on held-out images against leaving the model alone.

The published recipe (one clustering, isolated clusters) needs more than ten thousand images. Here every map is a
deviation from a coarser one, as large as the data support, and the maps are averaged with weights that predict
images that they were not fitted on. Where held-out images show no gain, the identity is returned.
"""

import dataclasses
import logging
import math

import numpy as np
import torch
from scipy.optimize import minimize, minimize_scalar
from sklearn.decomposition import PCA
from torch import Tensor

from cat_plugin.affine import fit_affine, fit_deviations, fit_shared
from cat_plugin.clustering import Clusters, cluster, one_cluster
from cat_plugin.config import CATConfig
from cat_plugin.correction import ClusterAffine
from cat_plugin.divergence import cross_entropy, fit_class_divergence, fit_shared_divergence

logger = logging.getLogger(__name__)

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
MIN_EVIDENCE = -1.0
"""Held-out gain, in standard errors, below which the identity is returned. Families are pulled to simple maps before
they are judged, so an estimate that few images leave near zero is not held against them."""
MIN_CHANGED = 1.0
"""Percentage of predictions that a correction has to change to be worth having."""
SELECTION_VALUES = 2**22
"""Largest number of logits that families are compared on; with more images a part of them is drawn."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A family of maps.

    kl_gain: by how much it lowers the held-out divergence, in nats, and kl_gain_error its standard error, as in
    `Evidence`; weight: its share in the correction.
    """

    name: str
    kl_gain: float
    kl_gain_error: float
    weight: float


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What held-out images say about a correction.

    images: how many there were. kl_gain: mean fall of the softened KL(FP || output), both at the scale that suits
    them best, in nats, and kl_gain_error its standard error. changed: percentage of predictions that the correction
    changes. accepted: whether it is used, and reason says why.
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
    """A correction, the evidence for it, and the cross-fitted outputs it was judged by.

    rows: (n,) int64, which of the given images these are. held_out: (n, C) float64, their logits, each corrected by
    maps that were fitted without it.
    """

    correction: ClusterAffine
    evidence: Evidence
    rows: Tensor
    held_out: Tensor


def select(q: Tensor, f: Tensor, config: CATConfig, h: Tensor | None = None) -> Selected:
    """Fits all families of maps, weighs them, and decides whether the result is worth having.

    The outcome does not depend on the order of the images.

    Args:
        q: (N, C) float64 logits of the quantized model, on the CPU.
        f: (N, C) float64 logits of the full-precision model.
        config: its `num_clusters`, `pca_dim`, `min_cluster_size`, `alpha` and `seed` count.
        h: (N, D) float64 features of a layer of the quantized model.
    """
    classes = q.shape[1]
    order = _canonical_order(q, f)
    if len(q) < MIN_IMAGES:
        reason = f"{len(q)} images are too few to learn from and to check; give at least {MIN_IMAGES}"
        evidence = Evidence(0, 0.0, 0.0, 0.0, False, reason)
        return Selected(ClusterAffine.identity(classes), evidence, order[:0], q[:0])
    generator = torch.Generator().manual_seed(config.seed)
    shuffled = order[torch.randperm(len(q), generator=generator)]
    rows = shuffled[: max(SELECTION_VALUES // classes, MIN_IMAGES)]
    data = _Data.prepare(q[rows], f[rows], None if h is None else h[rows], config)
    outputs = _cross_fit(data)
    outputs = _best_clusterings(outputs, data)
    weights = _weigh(outputs, data)
    held_out = sum(weight * outputs[name].double() for name, weight in weights.items())
    evidence = _judge(outputs, weights, held_out, data)
    if not evidence.accepted:
        return Selected(ClusterAffine.identity(classes), evidence, rows, data.q)
    judged = data.q + config.alpha * (held_out - data.q)
    if len(rows) < len(q):
        data = _Data.prepare(q[order], f[order], None if h is None else h[order], config, data.clusters_in(weights))
    maps = data.fit(torch.arange(len(data.q)), set(weights))
    total = _combine([(weight, maps[name]) for name, weight in weights.items() if weight > 0])
    return Selected(data.correction(total, config.alpha), evidence, rows, judged)


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


@dataclasses.dataclass(frozen=True, eq=False)
class _Data:
    """Images with what all families share: principal components, clusterings, and the teacher's softened predictions.

    z: (N, R + S) components of the logits, then of the features.
    """

    q: Tensor
    f: Tensor
    z: Tensor
    basis: _Basis
    feature_basis: _Basis | None
    clusterings: dict[int, Clusters]
    temperature: float
    teacher: Tensor

    @classmethod
    def prepare(
        cls, q: Tensor, f: Tensor, h: Tensor | None, config: CATConfig, counts: list[int] | None = None
    ) -> "_Data":
        basis = _Basis.fit(q, config.pca_dim, config.seed)
        feature_basis = None if h is None else _Basis.fit(h, config.pca_dim, config.seed)
        z = basis(q) if h is None else torch.cat([basis(q), feature_basis(h)], dim=1)
        clusterings = {1: one_cluster(*q.shape)}
        if counts is None:
            limit = config.clusters_for(len(q)) if len(basis.directions.T) else 1
            counts = [count for count in CLUSTER_COUNTS if count <= limit]
        for count in counts:
            clusterings[count] = cluster(q.numpy(), basis.mean.numpy(), basis.unwhitened(), count, config.seed)
        temperature = SOFTENING * max(f.std(dim=1).mean().item(), 1e-6) if q.shape[1] > 1 else 1.0
        teacher = (f / temperature).softmax(dim=1)
        return cls(q, f, z, basis, feature_basis, clusterings, temperature, teacher)

    @property
    def rank(self) -> int:
        """Components of the logits."""
        return self.basis.directions.shape[1]

    def fit(self, rows: Tensor, wanted: set[str] | None = None) -> dict[str, _Map]:
        """Maps of all families, or of those in `wanted`, from the images `rows` (n,)."""
        q, f, z, teacher = self.q[rows], self.f[rows], self.z[rows], self.teacher[rows]
        classes, none = q.shape[1], self.z.new_zeros(self.z.shape[1], q.shape[1])
        maps = {IDENTITY: _Map(torch.ones(1, classes).double(), torch.zeros(1, classes).double(), none)}

        def absent(*names: str) -> bool:
            return wanted is not None and wanted.isdisjoint(names)

        maps[AFFINE] = affine = _Map(*fit_affine(q, f, torch.zeros_like(rows), 1), none)
        if not absent(DIVERGENCE, *(_with_count(DIVERGENCE_CLUSTERS, count) for count in self.clusterings)):
            scale, shift = fit_class_divergence(q, teacher, self.temperature, PRIOR)
            maps[DIVERGENCE] = _Map(scale.unsqueeze(0), shift.unsqueeze(0), none)
        widths = {"": self.rank} if self.feature_basis is None else {"": self.rank, WITH_FEATURES: z.shape[1]}
        for suffix, width in widths.items():
            parts = z[:, :width]
            maps[SHARED + suffix] = shared = affine.plus_mix(*fit_shared(parts, f - affine.scale * q - affine.shift))
            if absent(SHARED_DIVERGENCE + suffix):
                continue
            ones = torch.cat([parts, parts.new_ones(len(parts), 1)], dim=1)
            start = q * shared.scale + shared.shift + z @ shared.mix
            coefficients = fit_shared_divergence(ones, start, teacher, self.temperature, PRIOR)
            maps[SHARED_DIVERGENCE + suffix] = shared.plus_mix(coefficients[:-1], coefficients[-1])
        for count, clusters in self.clusterings.items():
            if count == 1:
                continue
            ids = clusters.ids[rows]
            for name, parent in CLUSTERED.items():
                if not absent(_with_count(name, count)):
                    base = maps[parent]
                    residual = f - q * base.scale - base.shift - z @ base.mix
                    keep_slope = parent == DIVERGENCE  # least squares would flatten it, see `fit_deviations`
                    deviations = fit_deviations(q, residual, ids, count, keep_slope=keep_slope)
                    maps[_with_count(name, count)] = base.plus(*deviations, count)
        return maps

    def apply(self, affine_map: _Map, rows: Tensor) -> Tensor:
        """Output (n, C) of a map for the images `rows` (n,)."""
        ids = self.clusterings[affine_map.clusters].ids[rows]
        return self.q[rows] * affine_map.scale[ids] + affine_map.shift[ids] + self.z[rows] @ affine_map.mix

    def clusters_in(self, names: dict[str, float]) -> list[int]:
        """Numbers of clusters that the families `names` have."""
        return [count for count in self.clusterings if any(name.endswith(f"K={count}") for name in names)]

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


def _canonical_order(q: Tensor, f: Tensor) -> Tensor:
    """Indices (N,) that sort the images by their logits."""
    keys = torch.cat([q[:, :3], f[:, :3]], dim=1).T.flip(0)
    return torch.from_numpy(np.lexsort(keys.numpy()))


def _cross_fit(data: _Data) -> dict[str, Tensor]:
    """(N, C) float32 outputs of every family, each image by a map that was fitted without it.

    The components and clusterings are those of all images, which says nothing of their full-precision logits. Few
    images are cut into more parts, so that the maps judged are nearly those of all images.
    """
    n_images = len(data.q)
    folds = 10 if n_images <= 512 else 5
    outputs: dict[str, Tensor] = {}
    for fold in range(folds):
        held_out = torch.arange(fold, n_images, folds)
        kept = torch.ones(n_images, dtype=torch.bool)
        kept[held_out] = False
        for name, affine_map in data.fit(kept.nonzero().squeeze(1)).items():
            output = outputs.setdefault(name, torch.empty(data.q.shape, dtype=torch.float32))
            output[held_out] = data.apply(affine_map, held_out).float()
    return outputs


def _best_clusterings(outputs: dict[str, Tensor], data: _Data) -> dict[str, Tensor]:
    """`outputs` without the clusterings other than the one that brings a family nearest to full precision."""
    values = {}
    for count in data.clusterings:
        names = [_with_count(name, count) for name in CLUSTERED]
        if names[0] in outputs:
            values[count] = min(_divergence(outputs[name].double(), data.f, 1.0).mean().item() for name in names)
    best = min(values, key=values.get, default=None)
    dropped = {_with_count(name, count) for count in values if count != best for name in CLUSTERED}
    return {name: output for name, output in outputs.items() if name not in dropped}


def _weigh(outputs: dict[str, Tensor], data: _Data) -> dict[str, float]:
    """Non-negative weights of the families that minimise the held-out KL(FP || output) of their sum.

    Away from equal shares for the trusted families, weights are pulled back: few images cannot tell families apart.
    """
    names = list(outputs)
    stacked = torch.stack([output - output.mean(dim=1, keepdim=True) for output in outputs.values()]).double()
    teacher = data.f.softmax(dim=1)
    trusted = np.array([float(name in TRUSTED) for name in names])
    trusted /= trusted.sum()
    mean = torch.einsum("m,mnc->nc", torch.from_numpy(trusted), stacked)
    scale = _best_scale(mean, teacher)
    penalty = WEIGHT_PRIOR * _dispersion(stacked, (scale * mean).softmax(dim=1), teacher) / len(data.q)

    def value_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = cross_entropy(torch.einsum("m,mnc->nc", torch.from_numpy(weights), stacked), teacher)
        gradient = torch.einsum("mnc,nc->m", stacked, slope).numpy()
        away = weights / scale - trusted
        return value.item() + penalty * (away**2).sum(), gradient + 2 * penalty / scale * away

    found = minimize(value_and_gradient, scale * trusted, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(names))
    return {name: float(weight) for name, weight in zip(names, found.x, strict=True)}


def _dispersion(stacked: Tensor, predicted: Tensor, teacher: Tensor) -> float:
    """Variance of the slope of an image's divergence by the weights, relative to its curvature.

    1 where targets are drawn from the predictions; less where the teacher's soft predictions tell more than a label.
    """
    slopes = torch.einsum("mnc,nc->nm", stacked, predicted - teacher)
    curvature = torch.stack(
        [(predicted * part.square()).sum(dim=1) - (predicted * part).sum(dim=1).square() for part in stacked]
    ).mean(dim=1)
    return min((slopes.var(dim=0).sum() / curvature.sum().clamp(min=1e-12)).item(), 1.0)


def _judge(outputs: dict[str, Tensor], weights: dict[str, float], held_out: Tensor, data: _Data) -> Evidence:
    temperature = data.temperature
    plain = _divergence(data.q, data.f, temperature)

    def gain(output: Tensor) -> tuple[float, float]:
        gains = plain - _divergence(output, data.f, temperature)
        return gains.mean().item(), gains.std().item() / math.sqrt(len(gains))

    total = sum(weights.values())
    candidates = tuple(
        Candidate(name, *gain(output.double()), weights[name] / total if total else 0.0)
        for name, output in outputs.items()
    )
    kl_gain, error = gain(held_out)
    changed = 100.0 * (held_out.argmax(dim=1) != data.q.argmax(dim=1)).double().mean().item()
    if not kl_gain > MIN_EVIDENCE * error:
        reason = "nothing to gain: held-out outputs do not come nearer to full precision"
    elif changed < MIN_CHANGED:
        reason = f"nothing to gain: a correction would change {changed:.2f} % of the predictions"
    else:
        reason = f"held-out outputs come nearer to full precision, {changed:.2f} % of the predictions change"
    accepted = kl_gain > MIN_EVIDENCE * error and changed >= MIN_CHANGED
    return Evidence(len(data.q), kl_gain, error, changed, accepted, reason, candidates)


def _combine(parts: list[tuple[float, _Map]]) -> _Map:
    """The weighted sum of maps, of which those with clusters share one clustering."""
    clusters = max(part.clusters for _, part in parts)
    scale, shift = (
        sum(weight * getattr(part, name).expand(clusters, -1) for weight, part in parts) for name in ("scale", "shift")
    )
    return _Map(scale, shift, sum(weight * part.mix for weight, part in parts), clusters)


def _divergence(output: Tensor, f: Tensor, temperature: float) -> Tensor:
    """(N,) cross-entropy of softened predictions at the scale of `output` (N, C) that makes its mean smallest."""
    teacher = (f / temperature).softmax(dim=1)
    scaled = _best_scale(output / temperature, teacher) * output / temperature
    return scaled.logsumexp(dim=1) - (teacher * scaled).sum(dim=1)


def _best_scale(logits: Tensor, teacher: Tensor) -> float:
    """The factor of `logits` (N, C) that brings their softmax nearest to `teacher` on average."""
    inner = (teacher * logits).sum(dim=1).mean()
    found = minimize_scalar(
        lambda log_scale: ((math.exp(log_scale) * logits).logsumexp(dim=1).mean() - math.exp(log_scale) * inner).item(),
        bounds=(math.log(0.05), math.log(20)),
        method="bounded",
        options={"xatol": 1e-3},
    )
    return math.exp(found.x)
