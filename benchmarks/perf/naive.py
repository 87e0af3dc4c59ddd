"""The published recipe (arXiv 2509.26277) as one would write it down first: loops over clusters, classes and images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

Array = NDArray[np.float64]


def fit_affine(q: Array, f: Array, ids: NDArray[np.int64], num_clusters: int) -> tuple[Array, Array]:
    """Slopes and offsets, both (K, C), of logits `q` and `f` (N, C) in clusters `ids` (N,); identity for empty ones."""
    classes = q.shape[1]
    gamma, beta = np.ones((num_clusters, classes)), np.zeros((num_clusters, classes))
    for k in np.unique(ids):
        members = ids == k
        for c in range(classes):
            x, y = q[members, c], f[members, c]
            covariance = np.mean((x - x.mean()) * (y - y.mean()))
            gamma[k, c] = covariance / max(np.var(x), 1e-8)
            beta[k, c] = y.mean() - gamma[k, c] * x.mean()
    return gamma, beta


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A fitted recipe. pca: None where all classes are kept."""

    pca: PCA | None
    kmeans: KMeans
    gamma: Array
    beta: Array
    alpha: float

    @classmethod
    def fit(cls, q: Array, f: Array, num_clusters: int, pca_dim: int = 50, alpha: float = 0.4) -> "Paper":
        """Fits on logits `q` and `f`, both (N, C), N >= K."""
        pca = PCA(pca_dim, random_state=0).fit(q) if pca_dim < q.shape[1] else None
        features = q if pca is None else pca.transform(q)
        kmeans = KMeans(num_clusters, random_state=0, n_init="auto").fit(features)
        gamma, beta = fit_affine(q, f, kmeans.predict(features), num_clusters)
        return cls(pca=pca, kmeans=kmeans, gamma=gamma, beta=beta, alpha=alpha)

    def apply(self, q: Array) -> Array:
        """Corrected logits (N, C), an image at a time."""
        rows = []
        for row in q:
            features = row[None] if self.pca is None else self.pca.transform(row[None])
            k = self.kmeans.predict(features)[0]
            rows.append(row + self.alpha * (self.gamma[k] * row + self.beta[k] - row))
        return np.stack(rows)
