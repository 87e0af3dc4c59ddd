"""Slow and literal versions of what the packages do fast. Only tests use them."""

import numpy as np
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
