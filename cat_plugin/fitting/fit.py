"""Fitting a correction on paired logits, and scoring it on images that it has not seen."""

import dataclasses

import torch
from torch import Tensor

from cat_plugin.config import CATConfig
from cat_plugin.correction.module import ClusterAffine
from cat_plugin.errors import CATError
from cat_plugin.fitting.auto import Evidence, select
from cat_plugin.fitting.clustering import fit_clusters
from cat_plugin.fitting.least_squares import fit_affine
from cat_plugin.fitting.processes import ALONE, Processes
from cat_plugin.fitting.store import LogitStore
from cat_plugin.metrics import ClassChanges, agreement, agreement_gain, kl_divergence
from cat_plugin.running.collect import check_finite
from cat_plugin.running.positions import fold_of_rows

FOLDS = 5


@dataclasses.dataclass(frozen=True)
class HeldOutScores:
    """Closeness to the full-precision model on images that were held out from the fit.

    agreement: percentage of images with the same argmax. kl: mean KL(FP || .) in nats. `before` is
    the quantized model, `after` the corrected one. gain_low, gain_high: 95 % interval of the gain in agreement,
    by paired bootstrap. classes: by the argmax of the full-precision model, how many images came to agree with it, and
    how many no longer do.
    """

    agreement_before: float
    agreement_after: float
    kl_before: float
    kl_after: float
    gain_low: float
    gain_high: float
    classes: ClassChanges | None = dataclasses.field(default=None, repr=False)

    @property
    def agreement_gain(self) -> float:
        """Gain in agreement, percentage points."""
        return self.agreement_after - self.agreement_before

    def summary(self) -> list[str]:
        """What changes, in a few words each."""
        return [
            f"agreement with FP {self.agreement_before:.2f} -> {self.agreement_after:.2f} %",
            f"KL {self.kl_before:.4f} -> {self.kl_after:.4f} nats",
        ]

    def __str__(self) -> str:
        return (
            f"agreement with FP {self.agreement_before:.2f} -> {self.agreement_after:.2f} % "
            f"({self.agreement_gain:+.2f}, 95 % CI {self.gain_low:+.2f} to {self.gain_high:+.2f}), "
            f"KL(FP || output) {self.kl_before:.4f} -> {self.kl_after:.4f} nats"
        )

    @classmethod
    def of(cls, f: Tensor, q: Tensor, out: Tensor, images: Tensor | None = None) -> "HeldOutScores":
        """Scores of the corrected logits `out` of images with logits `q` and full-precision logits `f`, all (N, C).

        images: (N,), the image of every row, where rows are positions.
        """
        target = f.argmax(dim=1)
        return cls(
            agreement(f, q),
            agreement(f, out),
            kl_divergence(f, q),
            kl_divergence(f, out),
            *agreement_gain(f, q, out, images),
            ClassChanges.of(target, q.argmax(dim=1) == target, out.argmax(dim=1) == target, f.shape[1]),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A correction with what is known of it.

    held_out: None where images are too few to hold any out. evidence: what it was chosen by, in `"auto"` mode.
    images: how many it was fitted on, and positions: how many of their positions, where outputs have such; repeated:
    how many images or positions repeat another. q, f: (n, C) logits of those that it was judged on, and out: (n, C)
    corrected logits of these, by maps that were fitted without them; None where nothing was held out, and for layers.
    """

    correction: ClusterAffine
    held_out: HeldOutScores | None
    evidence: Evidence | None
    images: int
    positions: int | None
    repeated: int
    q: Tensor
    f: Tensor
    out: Tensor | None = None


def fit_cluster_affine(
    q: Tensor, f: Tensor, config: CATConfig | None = None, features: Tensor | None = None
) -> ClusterAffine:
    """Fits the correction that takes quantized logits to full-precision ones (arXiv 2509.26277).

    In `"auto"` mode, the default, maps of several families are weighed on held-out images, and the identity is
    returned where these show no gain, see `cat_plugin.fitting.auto`. In `"paper"` mode, clusters `q` by k-means after
    PCA, fits one least-squares affine map for each cluster and class, and moves the output by `config.alpha` of the
    way. Fitted in float64 on the CPU.

    Args:
        q: (N, C) logits of the quantized model, of any floating dtype, on any device.
        f: (N, C) logits of the full-precision model for the same images.
        config: `CATConfig()` by default.
        features: (N, D) outputs of a layer of the quantized model for the same images, averaged over positions, which
            feed the map too; `"auto"` only. The correction then takes them as its second argument.

    Returns:
        The correction, on the device of `q`, in float64 if `q` is and in float32 otherwise.

    Raises:
        CATError: `q` and `f` are not finite floating-point (N, C) with N >= 1, or `features` are not finite (N, D);
            in `"paper"` mode there are fewer images than clusters, or features; or `config` is no CATConfig.

    Example:
        >>> import torch
        >>> from cat_plugin import CATConfig, fit_cluster_affine
        >>> q = torch.randn(400, 3)
        >>> correction = fit_cluster_affine(q, 2 * q + 1, CATConfig.paper(num_clusters=1, alpha=1.0))
        >>> torch.allclose(correction(q), 2 * q + 1, atol=1e-4)
        True
        >>> torch.equal(fit_cluster_affine(q, q)(q), q)  # nothing to gain: left as it is
        True
    """
    config = _check(q, f, config, features)
    if config.mode == "paper":
        return fit_paper(q, f, config.clusters_for(len(q)), config)
    return _placed(select(LogitStore.of(q, f, features), config).correction, q)


def fit_and_score(store: LogitStore, config: CATConfig, processes: Processes = ALONE) -> Fit:
    """The correction for the logits in `store`, those of all processes together, and its scores by cross-fitting.

    Each image is scored by maps that were fitted on other images. In `"paper"` mode there are 5 folds, with as many
    clusters as the fit on all images has, or as a fold's training part has images. There are no scores where images
    are too few: one in `"paper"` mode, under 20 in `"auto"` mode.

    Args:
        store: finite logits of both models, and features.
        processes: that call this function, each with images of its own.

    Raises:
        CATError: in `"paper"` mode there are fewer images than clusters.
    """
    n_images = int(processes.sum(torch.tensor(store.num_images)))
    dense = store.images is not None
    if config.mode == "auto":
        made = select(store, config, processes)
        out = made.held_out if made.evidence.images > 0 else None
        scores = None if out is None else HeldOutScores.of(made.f, made.q, out, made.owners)
        correction = _placed(made.correction, torch.empty(0, dtype=store.dtype))
        positions = made.images if dense else None
        return Fit(correction, scores, made.evidence, n_images, positions, made.repeated, made.q, made.f, out)
    q, f, images = gather_all(store, processes)
    repeated = len(q) - len(torch.unique(torch.cat([q, f], dim=1), dim=0))
    correction = fit_paper(q, f, config.clusters_for(len(q)), config)
    out = cross_fitted(q, f, config, images)
    scores = None if out is None else HeldOutScores.of(f, q, out, images)
    return Fit(correction, scores, None, n_images, len(q) if dense else None, repeated, q, f, out)


def gather_all(store: LogitStore, processes: Processes) -> tuple[Tensor, Tensor, Tensor | None]:
    """All rows of all processes, `(q, f, images)`, logits (N, C) in the dtype of the store."""
    q, f, _ = store.take(torch.arange(len(store)))
    q, f = (processes.gather_rows(logits.to(store.dtype)) for logits in (q, f))
    images = store.images
    if images is not None:
        images = processes.gather_rows(images + processes.rows_before(store.num_images))
    return q, f, images


def cross_fitted(q: Tensor, f: Tensor, config: CATConfig, images: Tensor | None = None) -> Tensor | None:
    """(N, C) corrected logits, each row by the published recipe fitted on the other folds; None for one image."""
    n_rows = len(q)
    if images is None:
        order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(config.seed))
        fold_of = torch.empty(n_rows, dtype=torch.int64).index_copy_(0, order, torch.arange(n_rows) % FOLDS)
    else:
        fold_of = fold_of_rows(images, FOLDS, config.seed)
    if (fold_of == fold_of[0]).all():
        return None
    out = torch.empty_like(q)
    for fold in fold_of.unique():
        held_out = fold_of == fold
        num_clusters = min(config.clusters_for(n_rows), int((~held_out).sum()))
        out[held_out] = fit_paper(q[~held_out], f[~held_out], num_clusters, config)(q[held_out])
    return out


def fit_paper(q: Tensor, f: Tensor, num_clusters: int, config: CATConfig) -> ClusterAffine:
    """The published recipe with `num_clusters` clusters on `q` and `f`, both (N, C); the device and dtype are those of
    `q`."""
    wide_q, wide_f = (logits.detach().to("cpu", torch.float64, copy=True) for logits in (q, f))
    clusters = fit_clusters(wide_q, num_clusters, config)
    gamma, beta = fit_affine(wide_q, wide_f, clusters.ids, num_clusters)
    scale, shift = 1 + config.alpha * (gamma - 1), config.alpha * beta
    return _placed(ClusterAffine(clusters.weight, clusters.bias, scale, shift), q)


def _placed(correction: ClusterAffine, q: Tensor) -> ClusterAffine:
    """`correction` on the device of `q`, in float64 if `q` is and in float32 otherwise."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    parts = {name: buffer.to(dtype).to(q.device) for name, buffer in correction.named_buffers()}
    return ClusterAffine(**parts)


def _check(q: Tensor, f: Tensor, config: CATConfig | None, features: Tensor | None) -> CATConfig:
    """The resolved configuration, after everything given has been looked at."""
    for name, logits in (("q", q), ("f", f)):
        if not isinstance(logits, Tensor):
            raise CATError(f"{name} is a {type(logits).__name__}; expected a torch.Tensor (N, C)")
    is_floating = q.is_floating_point() and f.is_floating_point()
    if q.shape != f.shape or q.ndim != 2 or q.numel() == 0 or not is_floating:
        raise CATError(
            f"q has shape {tuple(q.shape)} and dtype {q.dtype}, f has shape {tuple(f.shape)} and dtype {f.dtype}; "
            "expected the same (N, C) twice, floating-point, with at least one image and one class"
        )
    check_finite(q, "q")
    check_finite(f, "f")
    config = CATConfig.resolve(config)
    if features is not None:
        if config.mode == "paper":
            raise CATError("features were given with mode='paper', which knows logits only; use mode='auto'")
        is_tensor = isinstance(features, Tensor) and features.is_floating_point()
        if not is_tensor or features.ndim != 2 or len(features) != len(q) or features.shape[1] == 0:
            found = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            raise CATError(f"features are {found}; expected a floating-point tensor ({len(q)}, D), one row an image")
        check_finite(features, "features")
    return config
