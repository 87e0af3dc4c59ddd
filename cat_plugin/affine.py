"""Closed-form maps from quantized to full-precision logits: least squares, and deviations that the data support."""

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
    mean_q, mean_f = (_cluster_sum(values, ids, counts) / counts.clamp(min=1).unsqueeze(1) for values in (q, f))
    # Centred first: E[q^2] - E[q]^2 would lose every digit when the mean is far from zero.
    centred_q, centred_f = q - mean_q[ids], f - mean_f[ids]
    divisor = counts.clamp(min=1).unsqueeze(1)
    covariance = _cluster_sum(centred_q * centred_f, ids, counts) / divisor
    gamma = covariance / (_cluster_sum(centred_q.square(), ids, counts) / divisor).clamp(min=MIN_VARIANCE)
    gamma[counts == 0] = 1.0  # means are 0 there, so the offset is 0
    return gamma, mean_f - gamma * mean_q


def fit_shared(z: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Linear map from features to what another map left over, each feature as strong as the data support.

    The coefficients of feature j, one for each class, are taken as draws from a normal distribution around 0 whose
    variance is estimated from them (empirical Bayes, by moments): least squares, times `t / (t + s)` with the
    variance t of the coefficients and s of their errors. A feature that explains nothing gets coefficients 0, so
    neither a rank nor a strength has to be chosen.

    Args:
        z: (N, R) float64 features, R < N - 2.
        residual: (N, C) float64.

    Returns:
        coefficients (R, C) and offset (C,) such that `residual ~ z @ coefficients + offset`.
    """
    n_images, n_features = z.shape
    mean_z, mean_residual = z.mean(dim=0), residual.mean(dim=0)
    centred, target = z - mean_z, residual - mean_residual
    gram = centred.T @ centred
    jitter = 1e-10 * gram.diagonal().mean().clamp(min=MIN_VARIANCE)
    inverse = torch.linalg.inv(gram + jitter * torch.eye(n_features, dtype=z.dtype))
    coefficients = inverse @ (centred.T @ target)
    errors = (target - centred @ coefficients).square().sum() / (residual.shape[1] * max(n_images - n_features - 1, 1))
    noise = inverse.diagonal() * errors
    signal = (coefficients.square().mean(dim=1) - noise).clamp(min=0)
    coefficients = coefficients * (signal / (signal + noise).clamp(min=torch.finfo(z.dtype).tiny)).unsqueeze(1)
    return coefficients, mean_residual - mean_z @ coefficients


def fit_deviations(
    q: Tensor, residual: Tensor, ids: Tensor, num_clusters: int, *, keep_slope: bool = False
) -> tuple[Tensor, Tensor]:
    """Each cluster's affine deviation from a map that all share, pulled to none as strongly as the data ask.

    `residual ~ slope[k] * q + offset[k]` within cluster k. Slopes and centred offsets are taken as draws from normal
    distributions around 0, with variances relative to the noise of a class that are estimated over all clusters and
    classes (empirical Bayes, by moments). So a cluster of five images inherits the shared map, and one of five
    hundred speaks.

    Args:
        q: (N, C) float64 logits of the quantized model.
        residual: (N, C) float64, what the shared map leaves of the full-precision logits.
        ids: (N,) int64, cluster of each image.
        num_clusters: K.
        keep_slope: leave the slope of the shared map as it is on average over the clusters. Noise in `q` flattens
            least-squares slopes, which lowers the largest logit; a shared map that was fitted otherwise need not be.

    Returns:
        slope (K, C) and offset (K, C), float64; 0 for clusters of fewer than three images.
    """
    counts = torch.bincount(ids, minlength=num_clusters)
    images = counts.clamp(min=1).unsqueeze(1).to(q.dtype)
    mean_q, mean_residual = (_cluster_sum(values, ids, counts) / images for values in (q, residual))
    centred_q, centred = q - mean_q[ids], residual - mean_residual[ids]
    power = _cluster_sum(centred_q.square(), ids, counts)
    slope = _cluster_sum(centred_q * centred, ids, counts) / power.clamp(min=MIN_VARIANCE)
    freedom = max(len(q) - 2 * num_clusters, 1)
    noise = ((centred - slope[ids] * centred_q).square().sum(dim=0) / freedom).clamp(min=1e-12)
    if keep_slope:
        slope = slope - (power * slope).sum(dim=0) / power.sum(dim=0).clamp(min=MIN_VARIANCE)
    spread = q.var(dim=0, correction=0).clamp(min=MIN_VARIANCE)
    speaks = ((counts > 2).unsqueeze(1) & (power > MIN_VARIANCE)).to(q.dtype)
    # E[mean^2] = noise * (tau + 1 / n) and E[slope^2] = noise * (tau / spread + 1 / power), summed and solved for tau.
    offset_tau = _moment(mean_residual.square() * images / noise, images.expand_as(power), speaks)
    slope_tau = _moment(slope.square() * power / noise, power / spread, speaks)
    offset = mean_residual * speaks * (images * offset_tau / (images * offset_tau + 1))
    slope = slope * speaks * (power * slope_tau / (power * slope_tau + spread))
    return slope, offset - slope * mean_q


def _moment(squares: Tensor, weights: Tensor, speaks: Tensor) -> Tensor:
    """Variance t, at least 0, from squares whose expectation is `1 + t * weights`."""
    return ((squares - 1) * speaks).sum().clamp(min=0) / (weights * speaks).sum().clamp(min=MIN_VARIANCE)


def _cluster_sum(values: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """(K, C) sums of `values` (N, C) over the images of each cluster."""
    return values.new_zeros(len(counts), values.shape[1]).index_add_(0, ids, values)
