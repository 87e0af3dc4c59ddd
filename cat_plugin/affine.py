"""Least-squares affine maps from quantized to full-precision logits, one for each cluster and class."""

import torch
from torch import Tensor

MIN_VARIANCE = 1e-8


def fit_affine(q: Tensor, f: Tensor, ids: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Slopes and offsets of `f ~ gamma * q + beta` within each cluster (arXiv 2509.26277).

    `gamma[k, c] = cov(q_c, f_c) / max(var(q_c), 1e-8)` and `beta[k, c] = mean(f_c) - gamma[k, c] * mean(q_c)`
    over the images of cluster k, with population statistics; a cluster without images gets the identity.

    Args:
        q: (N, C) logits of the quantized model.
        f: (N, C) logits of the full-precision model.
        ids: (N,) int64, cluster of each image, in [0, num_clusters).
        num_clusters: K.

    Returns:
        gamma (K, C) and beta (K, C), float64.
    """
    q, f = q.double(), f.double()
    counts = torch.bincount(ids, minlength=num_clusters)
    divisor = counts.clamp(min=1).unsqueeze(1)

    def cluster_mean(values: Tensor) -> Tensor:
        return values.new_zeros(num_clusters, values.shape[1]).index_add_(0, ids, values) / divisor

    mean_q, mean_f = cluster_mean(q), cluster_mean(f)
    # Centred first: E[q^2] - E[q]^2 would lose every digit when the mean is far from zero.
    centred_q, centred_f = q - mean_q[ids], f - mean_f[ids]
    gamma = cluster_mean(centred_q * centred_f) / cluster_mean(centred_q.square()).clamp(min=MIN_VARIANCE)
    gamma[counts == 0] = 1.0  # means are 0 there, so the offset is 0
    return gamma, mean_f - gamma * mean_q
