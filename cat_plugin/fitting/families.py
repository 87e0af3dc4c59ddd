"""The kinds of maps from quantized to full-precision logits that are tried, and how each is fitted."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from cat_plugin.config import CATConfig
from cat_plugin.correction.module import ClusterAffine
from cat_plugin.fitting.clustering import Clusters, cluster, one_cluster
from cat_plugin.fitting.divergence import fit_class_divergence, fit_shared_divergence
from cat_plugin.fitting.least_squares import AffineSums, DeviationSums, SharedSums
from cat_plugin.fitting.processes import ALONE, Processes
from cat_plugin.kinds import SOFTMAX, VALUE, OutputKind

SAMPLES_A_COMPONENT = 5
SOFTENING = 0.5
"""Temperature of the divergence as a share of the spread (std over classes) of full-precision logits: between
matching the largest logit (0) and matching all alike (infinity)."""
PRIOR = 10.0
"""Strength of the pull of a divergence's parameters to 0."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of map.

    =========  =======================================================================
    field      meaning
    =========  =======================================================================
    name       in the report
    base       the family that it deviates from; None: the identity itself
    low_rank   reads principal components of all logits, instead of one class at a time
    clustered  one map a cluster
    divergence minimises the divergence from FP's predictions, instead of squared errors
    =========  =======================================================================
    """

    name: str
    base: "Family | None" = None
    low_rank: bool = False
    clustered: bool = False
    divergence: bool = False


IDENTITY = Family("identity")
AFFINE = Family("affine", IDENTITY)
LOW_RANK = Family("low rank", AFFINE, low_rank=True)
KL_AFFINE = Family("KL per class", IDENTITY, divergence=True)
KL_LOW_RANK = Family("KL low rank", LOW_RANK, low_rank=True, divergence=True)
SHARED = (IDENTITY, AFFINE, LOW_RANK, KL_AFFINE, KL_LOW_RANK)
CLUSTERED = tuple(
    Family(name, base, clustered=True)
    for name, base in (("clusters", AFFINE), ("low rank + clusters", LOW_RANK), ("KL per class + clusters", KL_AFFINE))
)
TRUSTED = (KL_AFFINE, KL_LOW_RANK)
"""The families among which the weight is divided until held-out images say otherwise."""


@dataclasses.dataclass(frozen=True, eq=False)
class AffineMap:
    """`out = q * scale[ids] + shift[ids] + z @ mix`: scale and shift (K, C), mix (R, C), ids of the K clusters."""

    scale: Tensor
    shift: Tensor
    mix: Tensor

    def __call__(self, rows: "Rows") -> Tensor:
        """Outputs (n, C)."""
        several = len(self.scale) > 1
        scale, shift = (part[rows.ids] if several else part for part in (self.scale, self.shift))
        return torch.addmm(torch.addcmul(shift, rows.q, scale), rows.z, self.mix)

    def plus(self, slope: Tensor, offset: Tensor) -> "AffineMap":
        """The map with another scale and shift added, (K, C) or (C,)."""
        return AffineMap(self.scale + slope, self.shift + offset, self.mix)

    def plus_mix(self, mix: Tensor, offset: Tensor) -> "AffineMap":
        """The map with another low-rank part (R, C) and shift (C,) added."""
        return AffineMap(self.scale, self.shift + offset, self.mix + mix)

    @staticmethod
    def combined(parts: Iterable[tuple[float, "AffineMap"]]) -> "AffineMap":
        """The weighted sum of maps."""
        weighted = [tuple(weight * part for part in (m.scale, m.shift, m.mix)) for weight, m in parts]
        return AffineMap(*(sum(parts) for parts in zip(*weighted, strict=True)))


class Rows(NamedTuple):
    """Images, or positions of images, with what maps read of them.

    q, f: (n, C) logits of both models. z: (n, R) components of q. ids: (n,) int64 clusters. All in float64.
    """

    q: Tensor
    f: Tensor
    z: Tensor
    ids: Tensor

    def take(self, rows: Tensor) -> "Rows":
        """Those of the given indices (m,)."""
        return Rows(*(part[rows] for part in self))


Chunks = Callable[[], Iterable[Rows]]
"""Gives all rows, a part at a time, as often as it is called."""


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """Whitened principal components `(q - mean) @ directions`, (N, R), of logits (N, C)."""

    mean: Tensor
    directions: Tensor

    @classmethod
    def fit(cls, q: Tensor, limit: int, seed: int) -> "Basis":
        """Up to `limit` components of the logits `q` (N, C)."""
        if not torch.any(q != q[0]):
            return cls(q[0], q.new_zeros(q.shape[1], 0))
        pca = PCA(min(limit, *q.shape), random_state=seed).fit(q.numpy())
        kept = pca.explained_variance_ > 1e-8 * max(pca.explained_variance_.max(), 1e-12)
        directions = (pca.components_[kept] / np.sqrt(pca.explained_variance_[kept])[:, None]).T
        return cls(torch.from_numpy(pca.mean_), torch.from_numpy(np.ascontiguousarray(directions)))

    def __call__(self, q: Tensor) -> Tensor:
        return (q - self.mean) @ self.directions


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """What all families have in common: components, clusters, the temperature, and how much a row counts.

    clusters: those in use, and tried: those among which held-out images choose. share: effective samples a row, at most
    1; positions of an image are not independent of each other. kind: what outputs mean.
    """

    basis: Basis
    clusters: Clusters
    tried: tuple[Clusters, ...]
    temperature: float
    share: float
    kind: OutputKind

    @classmethod
    def of(cls, q: Tensor, f: Tensor, config: CATConfig, share: float = 1.0) -> "Shared":
        """From the logits `q` and `f`, both (N, C) float64; no clusters are in use yet."""
        samples = int(share * len(q))
        basis = Basis.fit(q, min(config.pca_dim, max(samples // SAMPLES_A_COMPONENT, 1)), config.seed)
        plain = (basis.directions / basis.directions.norm(dim=0)).numpy()
        counts = config.clusters_for(samples) if basis.directions.shape[1] else ()
        tried = tuple(
            cluster(q.numpy(), basis.mean.numpy(), plain, count, config.seed) for count in counts if count > 1
        )
        return cls(basis, one_cluster(*q.shape), tried, temperature_for(f, config.kind), share, config.kind)

    def teacher(self, f: Tensor) -> Tensor:
        """(n, C) FP's predictions, softened, from its outputs `f`."""
        return self.kind.means(f / self.temperature)

    def rows(self, q: Tensor, f: Tensor) -> Rows:
        """Logits (n, C) with what maps read of them."""
        ids = (q @ self.clusters.weight + self.clusters.bias).argmax(dim=1)
        return Rows(q, f, self.basis(q), ids)

    def identity(self) -> AffineMap:
        """The map that changes nothing."""
        directions = self.basis.directions
        ones = directions.new_ones(1, len(directions))
        return AffineMap(ones, torch.zeros_like(ones), directions.new_zeros(directions.shape[1], len(directions)))

    def correction(self, total: AffineMap, alpha: float) -> ClusterAffine:
        """The module that moves by `alpha` towards the output of `total`."""
        shift = total.shift - self.basis.mean @ self.basis.directions @ total.mix
        low_rank = {"project": self.basis.directions, "mix": alpha * total.mix} if total.mix.any() else {}
        clusters = self.clusters if len(total.scale) > 1 else one_cluster(0, total.scale.shape[1])
        scale = 1 + alpha * (total.scale - 1)
        return ClusterAffine(clusters.weight, clusters.bias, scale, alpha * shift, **low_rank)


def temperature_for(f: Tensor, kind: OutputKind) -> float:
    """What predictions of full-precision outputs (n, C) are softened by; of values, their spread."""
    spread = f.std(dim=1).mean() if kind is SOFTMAX and f.shape[1] > 1 else f.std()
    return (1.0 if kind is VALUE else SOFTENING) * max(spread.item(), 1e-6)


def fit_maps(
    families: Iterable[Family],
    shared: Shared,
    sample: Rows,
    chunks: Chunks | None = None,
    processes: Processes = ALONE,
    known: Mapping[Family, AffineMap] = MappingProxyType({}),
) -> dict[Family, AffineMap]:
    """The maps of `families`, and of those that they deviate from.

    Args:
        shared: what they have in common.
        sample: rows in memory, on which divergences are minimised.
        chunks: all rows of this process, whose squared errors are minimised; None: those of `sample`.
        processes: that call this function with chunks of their own, and with the same `sample`.
        known: maps that need not be fitted again.
    """
    maps = dict(known)

    def fit(family: Family) -> None:
        if family in maps:
            return
        if family.base is None:
            maps[family] = shared.identity()
            return
        fit(family.base)
        base = maps[family.base]
        if family.divergence:
            maps[family] = _fit_divergence(family, base, shared, sample)
        else:
            maps[family] = _fit_squares(family, base, shared, sample, chunks or (lambda: [sample]), processes)

    for family in families:
        fit(family)
    return maps


def _fit_squares(
    family: Family, base: AffineMap, shared: Shared, sample: Rows, chunks: Chunks, processes: Processes
) -> AffineMap:
    """Least squares of what `base` leaves, on all rows."""
    (rank, classes), count = base.mix.shape, len(shared.clusters.bias)
    if family.low_rank:
        sums = SharedSums(rank, classes)
        for rows in chunks():
            sums.add(rows.z, rows.f - base(rows))
        return base.plus_mix(*sums.over(processes).solve(shared.share))
    if family.clustered:
        sums = DeviationSums(count, sample.q.mean(dim=0))
        for rows in chunks():
            sums.add(rows.q, rows.f - base(rows), rows.ids)
        # Least squares would flatten the slope of a divergence's map.
        return base.plus(*sums.over(processes).solve(shared.share, keep_slope=family.base.divergence))
    sums = AffineSums(sample.q.mean(dim=0), sample.f.mean(dim=0))
    for rows in chunks():
        sums.add(rows.q, rows.f)
    gamma, beta = sums.over(processes).solve()
    return AffineMap(gamma, beta, base.mix)


def _fit_divergence(family: Family, base: AffineMap, shared: Shared, sample: Rows) -> AffineMap:
    """The least divergence from FP's predictions on `sample`, starting at `base`."""
    prior = PRIOR / shared.share
    teacher = shared.teacher(sample.f)
    if family.low_rank:
        ones = torch.cat([sample.z, sample.z.new_ones(len(sample.z), 1)], dim=1)
        coefficients = fit_shared_divergence(ones, base(sample), teacher, shared.temperature, prior, shared.kind)
        return base.plus_mix(coefficients[:-1], coefficients[-1])
    scale, shift = fit_class_divergence(sample.q, teacher, shared.temperature, prior, shared.kind)
    return AffineMap(scale.unsqueeze(0), shift.unsqueeze(0), base.mix)
