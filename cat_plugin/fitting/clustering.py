"""Clusters of the quantized model's logits, in a form that is one matrix product to apply."""

import logging
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from cat_plugin.config import CATConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Clusters:
    """A clustering whose assignment is `argmax(q @ weight + bias)`.

    weight: (C, K) float64. bias: (K,) float64, minus infinity for clusters without images.
    ids: (N,) int64, cluster of every image it was fitted on. sizes: (K,) int64, images in each.
    """

    weight: Tensor
    bias: Tensor
    ids: Tensor
    sizes: Tensor


def fit_clusters(q: Tensor, num_clusters: int, config: CATConfig) -> Clusters:
    """PCA and k-means on logits `q` (N, C), N >= num_clusters (arXiv 2509.26277).

    PCA, used where `config.pca_dim < C`, serves the clustering only.
    """
    n_images, n_classes = q.shape
    if num_clusters == 1:
        return one_cluster(n_images, n_classes)
    logits = q.detach().cpu().double().numpy()
    mean, projection = _projection(logits, config)
    return cluster(logits, mean, projection, num_clusters, config.seed)


def one_cluster(n_images: int, n_classes: int) -> Clusters:
    """All images together."""
    weight = torch.zeros(n_classes, 1, dtype=torch.float64, device="cpu")
    ids = torch.zeros(n_images, dtype=torch.int64, device="cpu")
    return Clusters(weight, weight.new_zeros(1), ids, ids.new_tensor([n_images]))


def cluster(logits: np.ndarray, mean: np.ndarray, projection: np.ndarray, num_clusters: int, seed: int) -> Clusters:
    """K-means on the features `z = (logits - mean) @ projection`, N >= num_clusters.

    Projection and squared distance fold into one matrix, since the nearest centroid m of z = (q - mean) P maximises
    z m - |m|^2 / 2 = q (P m) - mean (P m) - |m|^2 / 2.

    Args:
        logits: (N, C) float64. mean: (C,). projection: (C, D).
    """
    centroids = _kmeans_centroids((logits - mean) @ projection, num_clusters, seed)
    weight = projection @ centroids.T
    bias = -mean @ weight - 0.5 * (centroids**2).sum(axis=1)
    # What all clusters have in common does not change the argmax but costs digits in float32.
    weight -= weight.mean(axis=1, keepdims=True)
    bias -= bias.mean()

    ids = (logits @ weight + bias).argmax(axis=1)
    sizes = np.bincount(ids, minlength=num_clusters)
    # Only copies of another centroid stay empty (fewer distinct images than clusters). They must
    # not win a tie by rounding, because nothing was learnt for them.
    bias[sizes == 0] = -np.inf
    return Clusters(*(torch.from_numpy(array) for array in (weight, bias, ids, sizes)))


def _projection(logits: np.ndarray, config: CATConfig) -> tuple[np.ndarray, np.ndarray]:
    """Mean (C,) and matrix (C, D) of the features z = (logits - mean) @ matrix; D = C without PCA."""
    n_images, n_classes = logits.shape
    if config.pca_dim >= n_classes:
        return logits.mean(axis=0), np.eye(n_classes)
    pca = PCA(min(config.pca_dim, n_images), random_state=config.seed).fit(logits)
    return pca.mean_, pca.components_.T


def _kmeans_centroids(features: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    kmeans = KMeans(num_clusters, n_init="auto", random_state=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kmeans.fit(features)
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            logger.info("k-means: %s", warning.message)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return kmeans.cluster_centers_
