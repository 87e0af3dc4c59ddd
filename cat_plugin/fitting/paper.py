"""The published recipe: isolated clusters, least squares for each cluster and class (arXiv 2509.26277)."""

import torch
from torch import Tensor

from cat_plugin.config import CATConfig
from cat_plugin.correction.module import ClusterAffine, compute_dtype
from cat_plugin.fitting.clustering import fit_clusters
from cat_plugin.fitting.least_squares import fit_affine
from cat_plugin.running.positions import fold_of_rows

FOLDS = 5


def fit_paper(q: Tensor, f: Tensor, num_clusters: int, config: CATConfig) -> ClusterAffine:
    """The recipe with `num_clusters` clusters on `q` and `f`, both (N, C); the device and dtype are those of `q`."""
    wide_q, wide_f = (logits.detach().to("cpu", torch.float64, copy=True) for logits in (q, f))
    clusters = fit_clusters(wide_q, num_clusters, config)
    gamma, beta = fit_affine(wide_q, wide_f, clusters.ids, num_clusters)
    scale, shift = 1 + config.alpha * (gamma - 1), config.alpha * beta
    return ClusterAffine(clusters.weight, clusters.bias, scale, shift).to(q.device, compute_dtype(q))


def cross_fitted(q: Tensor, f: Tensor, config: CATConfig, images: Tensor | None = None) -> Tensor | None:
    """(N, C) corrected logits, each row by the recipe fitted on the other folds; None for one image."""
    images = torch.arange(len(q), device="cpu") if images is None else images
    fold_of = fold_of_rows(images, FOLDS, config.seed)
    if (fold_of == fold_of[0]).all():
        return None
    out = torch.empty_like(q)
    for fold in fold_of.unique():
        held_out = fold_of == fold
        num_clusters = min(*config.clusters_for(len(q)), int((~held_out).sum()))
        out[held_out] = fit_paper(q[~held_out], f[~held_out], num_clusters, config)(q[held_out])
    return out
