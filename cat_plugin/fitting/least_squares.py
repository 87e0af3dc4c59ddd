"""Closed-form maps from quantized to full-precision logits: least squares, and deviations that the data support."""

import torch
from torch import Tensor

from cat_plugin.fitting.processes import Processes

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


class AffineSums:
    """Statistics of `f ~ gamma * q + beta` over all images, added up chunk by chunk.

    Args:
        mean_q, mean_f: (C,) float64 values near the means, from which deviations are counted, to keep digits.
    """

    def __init__(self, mean_q: Tensor, mean_f: Tensor) -> None:
        self._mean_q, self._mean_f = mean_q, mean_f
        self.sums = mean_q.new_zeros(5, len(mean_q))

    def add(self, q: Tensor, f: Tensor) -> "AffineSums":
        """Adds images with logits `q` and `f`, both (n, C) float64."""
        q, f = q - self._mean_q, f - self._mean_f
        parts = (torch.ones_like(q), q, f, q.square(), q * f)
        self.sums += torch.stack([part.sum(dim=0) for part in parts])
        return self

    def over(self, processes: Processes) -> "AffineSums":
        """The sums of all processes together."""
        self.sums = processes.sum(self.sums)
        return self

    def solve(self) -> tuple[Tensor, Tensor]:
        """gamma (1, C) and beta (1, C), as `fit_affine` with one cluster."""
        count, *sums = self.sums
        q, f, qq, qf = (part / count for part in sums)
        gamma = (qf - q * f) / (qq - q.square()).clamp(min=MIN_VARIANCE)
        beta = f + self._mean_f - gamma * (q + self._mean_q)
        return gamma.unsqueeze(0), beta.unsqueeze(0)


class SharedSums:
    """Linear map from R features to what another map left over, each feature as strong as the data support.

    `residual ~ z @ coefficients + offset`, from statistics that are added up chunk by chunk. The coefficients of
    feature j, one for each of C classes, are taken as draws from a normal distribution around 0 whose variance is
    estimated from them (empirical Bayes, by moments): least squares, times `t / (t + s)` with the variance t of the
    coefficients and s of their errors. A feature that explains nothing gets coefficients 0, so neither a rank nor a
    strength has to be chosen.
    """

    def __init__(self, features: int, classes: int) -> None:
        self.sums = torch.zeros(features + 1, features + 1 + classes, dtype=torch.float64, device="cpu")
        self.power = torch.zeros(classes, dtype=torch.float64, device="cpu")

    def add(self, z: Tensor, residual: Tensor) -> "SharedSums":
        """Adds images with features `z` (n, R) and what is left of their logits, (n, C), both float64."""
        design = torch.cat([z, z.new_ones(len(z), 1)], dim=1)
        self.sums += design.T @ torch.cat([design, residual], dim=1)
        self.power += residual.square().sum(dim=0)
        return self

    def over(self, processes: Processes) -> "SharedSums":
        """The sums of all processes together."""
        self.sums, self.power = processes.sum(self.sums), processes.sum(self.power)
        return self

    def solve(self, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Coefficients (R, C) and offset (C,); `share` is that of effective samples among the rows."""
        features, classes = len(self.sums) - 1, len(self.power)
        n_images = self.sums[features, features]
        mean_z, mean_residual = self.sums[features, :features] / n_images, self.sums[features, -classes:] / n_images
        gram = self.sums[:features, :features] - n_images * mean_z.outer(mean_z)
        cross = self.sums[:features, -classes:] - n_images * mean_z.outer(mean_residual)
        power = self.power - n_images * mean_residual.square()
        jitter = 1e-10 * gram.diagonal().sum().clamp(min=MIN_VARIANCE) / max(features, 1)
        inverse = torch.linalg.inv(gram + jitter * torch.eye(features, dtype=gram.dtype, device=gram.device))
        coefficients = inverse @ cross
        errors = (power.sum() - (coefficients * cross).sum()).clamp(min=0)
        noise = inverse.diagonal() * errors / (classes * (share * n_images - features - 1).clamp(min=1))
        signal = (coefficients.square().mean(dim=1) - noise).clamp(min=0)
        coefficients = coefficients * (signal / (signal + noise).clamp(min=torch.finfo(noise.dtype).tiny)).unsqueeze(1)
        return coefficients, mean_residual - mean_z @ coefficients


class DeviationSums:
    """Each cluster's affine deviation from a map that all share, pulled to none as strongly as the data ask.

    `residual ~ slope[k] * q + offset[k]` within cluster k of K, from statistics that are added up chunk by chunk.
    Slopes and centred offsets are taken as draws from normal distributions around 0, with variances relative to the
    noise of a class that are estimated over all clusters and classes (empirical Bayes, by moments). So a cluster of
    five images inherits the shared map, and one of five hundred speaks; fewer than three say nothing.

    With `keep_slope`, the slope of the shared map is left as it is on average over the clusters. Noise in `q` flattens
    least-squares slopes, which lowers the largest logit; a shared map that was fitted otherwise need not be.

    Args:
        mean: (C,) float64 logits near the mean, from which deviations are counted, to keep digits.
    """

    def __init__(self, num_clusters: int, mean: Tensor) -> None:
        self._mean = mean
        self.counts = torch.zeros(num_clusters, dtype=torch.float64, device="cpu")
        self.sums = torch.zeros(5, num_clusters, len(mean), dtype=torch.float64, device="cpu")

    def add(self, q: Tensor, residual: Tensor, ids: Tensor) -> "DeviationSums":
        """Adds images with logits `q` and what is left of the targets, both (n, C) float64, in the clusters `ids`."""
        q = q - self._mean
        self.counts += torch.bincount(ids, minlength=len(self.counts))
        for total, part in zip(self.sums, (q, residual, q.square(), q * residual, residual.square()), strict=True):
            total.index_add_(0, ids, part)
        return self

    def over(self, processes: Processes) -> "DeviationSums":
        """The sums of all processes together."""
        self.counts, self.sums = processes.sum(self.counts), processes.sum(self.sums)
        return self

    def solve(self, share: float = 1.0, *, keep_slope: bool = False) -> tuple[Tensor, Tensor]:
        """slope (K, C) and offset (K, C); `share` is that of effective samples among the rows."""
        counts, sums = share * self.counts, share * self.sums
        images = counts.where(counts > 0, 1.0).unsqueeze(1)
        mean_q, mean_residual = sums[0] / images, sums[1] / images
        power = (sums[2] - images * mean_q.square()).clamp(min=0)
        cross = sums[3] - images * mean_q * mean_residual
        slope = cross / power.clamp(min=MIN_VARIANCE)
        squares = (sums[4] - images * mean_residual.square() - slope * cross).clamp(min=0).sum(dim=0)
        n_images = counts.sum()
        noise = (squares / (n_images - 2 * len(counts)).clamp(min=1)).clamp(min=1e-12)
        if keep_slope:
            slope = slope - (power * slope).sum(dim=0) / power.sum(dim=0).clamp(min=MIN_VARIANCE)
        totals = sums.sum(dim=1) / n_images
        spread = (totals[2] - totals[0].square()).clamp(min=MIN_VARIANCE)
        speaks = ((counts > 2).unsqueeze(1) & (power > MIN_VARIANCE)).double()
        # E[mean^2] = noise * (tau + 1 / n), E[slope^2] = noise * (tau / spread + 1 / power): summed, solved for tau.
        offset_tau = _moment(mean_residual.square() * images / noise, images.expand_as(power), speaks)
        slope_tau = _moment(slope.square() * power / noise, power / spread, speaks)
        offset = mean_residual * speaks * (images * offset_tau / (images * offset_tau + 1))
        slope = slope * speaks * (power * slope_tau / (power * slope_tau + spread))
        return slope, offset - slope * (mean_q + self._mean)


def _moment(squares: Tensor, weights: Tensor, speaks: Tensor) -> Tensor:
    """Variance t, at least 0, from squares whose expectation is `1 + t * weights`."""
    return ((squares - 1) * speaks).sum().clamp(min=0) / (weights * speaks).sum().clamp(min=MIN_VARIANCE)


def effective_share(q: Tensor, f: Tensor, owners: Tensor | None) -> float:
    """Independent samples a row, between one an image and one a row: 1 over Kish's design effect.

    The design effect is the variance of sums over images of what the affine map of all rows leaves of `f`, relative
    to what it were if rows of an image had nothing in common; a mean over classes, by their variance (Kish, Survey
    Sampling, 1965).

    Args:
        q, f: (N, C) float64 logits of both models.
        owners: (N,) int64, the image of every row; None: every row is one.
    """
    if owners is None:
        return 1.0
    gamma, beta = fit_affine(q, f, torch.zeros_like(owners), 1)
    residual = f - gamma * q - beta
    found, index, sizes = owners.unique(return_inverse=True, return_counts=True)
    sums = residual.new_zeros(len(found), residual.shape[1]).index_add_(0, index, residual)
    effect = (sums.square().sum() / residual.square().sum().clamp(min=torch.finfo(residual.dtype).tiny)).item()
    most = (sizes.double().square().sum() / sizes.sum()).item()
    return 1 / min(max(effect, 1.0), most)
