"""Fitting a correction on paired logits, and scoring it on images that it has not seen."""

import dataclasses

import torch
from torch import Tensor

from cat_plugin.affine import fit_affine
from cat_plugin.clustering import fit_clusters
from cat_plugin.collect import check_finite
from cat_plugin.config import CATConfig
from cat_plugin.correction import ClusterAffine
from cat_plugin.errors import CATError
from cat_plugin.metrics import agreement, kl_divergence

FOLDS = 5


@dataclasses.dataclass(frozen=True)
class HeldOutScores:
    """Closeness to the full-precision model on images that were held out from the fit.

    agreement: percentage of images with the same argmax. kl: mean KL(FP || .) in nats. `before` is
    the quantized model, `after` the corrected one.
    """

    agreement_before: float
    agreement_after: float
    kl_before: float
    kl_after: float


def fit_cluster_affine(q: Tensor, f: Tensor, config: CATConfig | None = None) -> ClusterAffine:
    """Fits the correction that takes quantized logits to full-precision ones (arXiv 2509.26277).

    Clusters `q` by k-means after PCA, fits one least-squares affine map for each cluster and class,
    and moves the output by `config.alpha` of the way. Fitted in float64 on the CPU.

    Args:
        q: (N, C) logits of the quantized model, of any floating dtype, on any device.
        f: (N, C) logits of the full-precision model for the same images.
        config: `CATConfig()` by default.

    Returns:
        The correction, on the device of `q`, in float64 if `q` is and in float32 otherwise.

    Raises:
        CATError: `q` and `f` are not finite floating-point (N, C) with N >= 1, or hold fewer images than clusters;
            or `config` is no CATConfig.
    """
    _check_logits(q, f)
    config = CATConfig.resolve(config)
    return _fit(q, f, config.clusters_for(len(q)), config)


def held_out_scores(q: Tensor, f: Tensor, config: CATConfig | None = None) -> HeldOutScores | None:
    """Scores the fit on `q` and `f`, both (N, C), by 5-fold cross-fitting.

    Every image is corrected by a map fitted on the other folds, with as many clusters as the fit
    on all images has, or as a fold's training part has images. None for a single image.
    """
    _check_logits(q, f)
    config = CATConfig.resolve(config)
    n_images = len(q)
    if n_images < 2:
        return None
    num_clusters = config.clusters_for(n_images)
    q, f = q.detach().cpu(), f.detach().cpu()
    order = torch.randperm(n_images, generator=torch.Generator().manual_seed(config.seed))
    out = torch.empty_like(q)
    for fold in range(min(FOLDS, n_images)):
        held_out = torch.zeros(n_images, dtype=torch.bool)
        held_out[order[fold::FOLDS]] = True
        n_train = n_images - int(held_out.sum())
        correction = _fit(q[~held_out], f[~held_out], min(num_clusters, n_train), config)
        out[held_out] = correction(q[held_out])
    return HeldOutScores(agreement(f, q), agreement(f, out), kl_divergence(f, q), kl_divergence(f, out))


def _fit(q: Tensor, f: Tensor, num_clusters: int, config: CATConfig) -> ClusterAffine:
    wide_q, wide_f = (logits.detach().to("cpu", torch.float64, copy=True) for logits in (q, f))
    clusters = fit_clusters(wide_q, num_clusters, config)
    gamma, beta = fit_affine(wide_q, wide_f, clusters.ids, num_clusters)
    scale, shift = 1 + config.alpha * (gamma - 1), config.alpha * beta
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return ClusterAffine(*(part.to(dtype).to(q.device) for part in (clusters.weight, clusters.bias, scale, shift)))


def _check_logits(q: Tensor, f: Tensor) -> None:
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
