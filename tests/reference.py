"""Slow and literal versions of what the packages do fast. Only tests use them."""

import math

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA


class PaperCAT:
    """Cluster-based Affine Transformation as arXiv 2509.26277 states it: loops, and scikit-learn's `predict`."""

    def __init__(self, num_clusters, pca_dim, alpha, seed=0):
        self.num_clusters, self.pca_dim, self.alpha, self.seed = num_clusters, pca_dim, alpha, seed

    def fit(self, q, f):
        """Fits on float64 arrays `q` and `f`, both (N, C)."""
        classes = q.shape[1]
        self.pca = PCA(self.pca_dim, random_state=self.seed).fit(q) if self.pca_dim < classes else None
        features = self._features(q)
        self.kmeans = KMeans(self.num_clusters, random_state=self.seed, n_init="auto").fit(features)
        ids = self.kmeans.predict(features)
        self.gamma, self.beta = np.ones((self.num_clusters, classes)), np.zeros((self.num_clusters, classes))
        for k in range(self.num_clusters):
            members = ids == k
            if not members.any():
                continue
            for c in range(classes):
                x, y = q[members, c], f[members, c]
                covariance = np.mean((x - x.mean()) * (y - y.mean()))
                self.gamma[k, c] = covariance / max(np.var(x), 1e-8)
                self.beta[k, c] = y.mean() - self.gamma[k, c] * x.mean()
        return self

    def apply(self, q):
        """Corrected logits (N, C), one sample at a time."""
        ids = self.kmeans.predict(self._features(q))
        rows = []
        for row, k in zip(q, ids, strict=True):
            corrected = self.gamma[k] * row + self.beta[k]
            rows.append(row + self.alpha * (corrected - row))
        return np.stack(rows)

    def _features(self, q):
        return q if self.pca is None else self.pca.transform(q)


def lstsq_per_cluster(q, f, ids, num_clusters):
    """Slopes and offsets, both (K, C), by `numpy.linalg.lstsq` for each cluster and class."""
    gamma, beta = np.ones((num_clusters, q.shape[1])), np.zeros((num_clusters, q.shape[1]))
    for k in np.unique(ids):
        for c in range(q.shape[1]):
            x = q[ids == k, c]
            design = np.stack([x, np.ones_like(x)], axis=1)
            gamma[k, c], beta[k, c] = np.linalg.lstsq(design, f[ids == k, c], rcond=None)[0]
    return gamma, beta


def shrunk_least_squares(z, residual, share=1.0):
    """Coefficients (R, C) and offset (C,) of `residual` by features, one feature at a time pulled to 0.

    Least squares times t / (t + s): t is the variance of a feature's coefficients, estimated as their mean square less
    s, that of their errors.
    """
    (rows, features), classes = z.shape, residual.shape[1]
    design = np.hstack([z, np.ones((rows, 1))])
    solution = np.linalg.lstsq(design, residual, rcond=None)[0]
    error = ((residual - design @ solution) ** 2).sum() / (classes * (share * rows - features - 1))
    inverse = np.linalg.inv(np.cov(z.T, bias=True) * rows)
    coefficients = np.zeros((features, classes))
    for feature in range(features):
        noise = inverse[feature, feature] * error
        signal = max((solution[feature] ** 2).mean() - noise, 0)
        coefficients[feature] = solution[feature] * signal / (signal + noise)
    return coefficients, residual.mean(axis=0) - z.mean(axis=0) @ coefficients


def shrunk_deviations(q, residual, ids, num_clusters, share=1.0, keep_slope=False):
    """Slope and offset (K, C) of `residual` by `q` in each cluster, pulled to 0, by loops over clusters and classes.

    With noise v of a class, slopes and means of a cluster have the variances v * (1 / power + tau / spread) and
    v * (1 / images + tau), where tau is estimated over all clusters of three images or more.
    """
    classes = q.shape[1]
    images, power, slope, mean = np.zeros((4, num_clusters, classes))
    squares = np.zeros(classes)
    for k in np.unique(ids):
        for c in range(classes):
            x, y = q[ids == k, c], residual[ids == k, c]
            images[k, c], power[k, c], mean[k, c] = share * len(x), share * len(x) * np.var(x), y.mean()
            slope[k, c] = np.polyfit(x, y, 1)[0] if len(x) > 1 else 0.0
            squares[c] += share * ((y - y.mean() - slope[k, c] * (x - x.mean())) ** 2).sum()
    noise, spread = squares / (share * len(q) - 2 * num_clusters), np.var(q, axis=0)
    if keep_slope:
        slope = slope - (power * slope).sum(axis=0) / power.sum(axis=0)
    speaking = [(k, c) for k in range(num_clusters) for c in range(classes) if images[k, c] > 2]
    offset_tau = sum(mean[k, c] ** 2 * images[k, c] / noise[c] - 1 for k, c in speaking)
    offset_tau = max(offset_tau / sum(images[k, c] for k, c in speaking), 0)
    slope_tau = sum(slope[k, c] ** 2 * power[k, c] / noise[c] - 1 for k, c in speaking)
    slope_tau = max(slope_tau / sum(power[k, c] / spread[c] for k, c in speaking), 0)
    slopes, offsets = np.zeros((2, num_clusters, classes))
    for k, c in speaking:
        slopes[k, c] = slope[k, c] * slope_tau / (slope_tau + spread[c] / power[k, c])
        shrunk = mean[k, c] * offset_tau / (offset_tau + 1 / images[k, c])
        offsets[k, c] = shrunk - slopes[k, c] * q[ids == k, c].mean()
    return slopes, offsets


def least_divergence(output, shape, teacher, temperature, prior):
    """Parameters of `shape` that minimise a divergence, by scipy with gradients of autograd.

    The divergence is mean KL(teacher || softmax(output(parameters) / T)) + prior / (2 N) * |parameters / T|^2.
    """

    def objective(flat):
        parameters = torch.tensor(flat.reshape(shape), requires_grad=True)
        predicted = (output(parameters) / temperature).log_softmax(dim=1)
        divergence = torch.nn.functional.kl_div(predicted, teacher, reduction="batchmean")
        value = divergence + prior / (2 * len(teacher)) * (parameters / temperature).square().sum()
        value.backward()
        return value.item(), parameters.grad.numpy().ravel()

    found = minimize(objective, np.zeros(math.prod(shape)), jac=True, method="BFGS", options={"gtol": 1e-8})
    return torch.from_numpy(found.x.reshape(shape))


_KL_CLUSTERS = "KL per class + clusters"


def naive_maps(q, f, z, ids, num_clusters, temperature, prior, share=1.0, sample=slice(None)):
    """The map of every family by its name, `(scale (K or 1, C), shift (K or 1, C), mix (R, C))`, float64 arrays.

    From logits `q` and `f` (N, C), components `z` (N, R) and clusters `ids` (N,), all of them arrays. Divergences are
    minimised on the rows of `sample` alone.
    """
    none = np.zeros((z.shape[1], q.shape[1]))
    maps = {"identity": (np.ones((1, q.shape[1])), np.zeros((1, q.shape[1])), none)}
    maps["affine"] = (*lstsq_per_cluster(q, f, np.zeros(len(q), dtype=int), 1), none)

    def output(name):
        scale, shift, mix = maps[name]
        return q * scale + shift + z @ mix

    mix, offset = shrunk_least_squares(z, f - output("affine"), share)
    maps["low rank"] = maps["affine"][0], maps["affine"][1] + offset, mix

    teacher = torch.from_numpy(f[sample] / temperature).softmax(dim=1)
    settings = (teacher, temperature, prior / share)
    mean, std = q[sample].mean(axis=0), q[sample].std(axis=0)
    plain, standard = torch.from_numpy(q[sample]), torch.from_numpy((q[sample] - mean) / std)
    slope, offset = least_divergence(lambda p: plain + p[0] * standard + p[1], (2, q.shape[1]), *settings).numpy()
    maps["KL per class"] = (1 + slope / std)[None], (offset - slope * mean / std)[None], none
    start, ones = torch.from_numpy(output("low rank")[sample]), np.hstack([z, np.ones((len(z), 1))])
    read = torch.from_numpy(ones[sample])
    added = least_divergence(lambda p: start + read @ p, (read.shape[1], q.shape[1]), *settings).numpy()
    scale, shift, mix = maps["low rank"]
    maps["KL low rank"] = scale, shift + added[-1], mix + added[:-1]

    for name, base in (("clusters", "affine"), ("low rank + clusters", "low rank"), (_KL_CLUSTERS, "KL per class")):
        residual, keep_slope = f - output(base), name == _KL_CLUSTERS
        slope, offset = shrunk_deviations(q, residual, ids, num_clusters, share, keep_slope)
        scale, shift, mix = maps[base]
        maps[name] = scale + slope, shift + offset, mix
    return maps
