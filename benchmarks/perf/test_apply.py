"""The correction against the network that it corrects, and against scikit-learn's `predict` for each image.

`pytest benchmarks/perf` times all three and then holds their medians against the bars. It is no part of the tests.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torchvision.models import resnet18

from cat_plugin import CATConfig, ClusterAffine, fit_cluster_affine

CLASSES, CLUSTERS, BATCH, PIXELS, IMAGES = 1000, 64, 64, 224, 1024
KINDS = ("paper", "auto")
MAX_SHARE = 0.001
"""Of a forward pass of ResNet-18."""
MIN_SPEEDUP = 8
"""Against a loop over images."""

medians: dict[str, float] = {}
"""Seconds, by what was timed."""


def normal(*shape: int, seed: int) -> torch.Tensor:
    """Of logits, images or weights, whose values do not matter here."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keep_median(name: str, benchmark) -> None:
    if benchmark.stats is not None:  # as with --benchmark-disable
        medians[name] = benchmark.stats.stats.median


@pytest.fixture(scope="module", autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def make_correction(kind: str) -> ClusterAffine:
    """The published recipe, or one with a map of 50 components that all clusters share, as the default has."""
    q = normal(IMAGES, CLASSES, seed=0)
    paper = fit_cluster_affine(q, 1.1 * q, CATConfig.paper(CLUSTERS))
    shared = {"project": normal(CLASSES, 50, seed=2), "mix": normal(50, CLASSES, seed=3)} if kind == "auto" else {}
    return ClusterAffine(**dict(paper.named_buffers()), **shared)


def test_resnet18_forward(benchmark):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet18(weights=None).eval()
    benchmark.pedantic(model, (normal(BATCH, 3, PIXELS, PIXELS, seed=1),), rounds=5, warmup_rounds=1)
    keep_median("network", benchmark)


@pytest.mark.parametrize("kind", KINDS)
def test_correction(benchmark, kind):
    benchmark(make_correction(kind), normal(BATCH, CLASSES, seed=1))
    keep_median(kind, benchmark)


def test_loop_over_images(benchmark):
    """As the published code does: PCA, `predict` and the map of its cluster for one image at a time."""
    q = normal(IMAGES, CLASSES, seed=0).numpy()
    pca = PCA(50, random_state=0).fit(q)
    kmeans = KMeans(CLUSTERS, random_state=0, n_init="auto").fit(pca.transform(q))
    gamma, beta = np.ones((CLUSTERS, CLASSES), np.float32), np.zeros((CLUSTERS, CLASSES), np.float32)
    batch = normal(BATCH, CLASSES, seed=1).numpy()

    def loop() -> np.ndarray:
        rows = []
        for row in batch:
            k = kmeans.predict(pca.transform(row[None]))[0]
            rows.append(row + 0.4 * (gamma[k] * row + beta[k] - row))
        return np.stack(rows)

    benchmark(loop)
    keep_median("loop", benchmark)


@pytest.mark.parametrize("kind", KINDS)
def test_bars(kind, record_property):
    """Of the medians above."""
    if set(medians) != {"network", "loop", *KINDS}:
        pytest.skip("needs the timings of all tests above in one run")
    share, speedup = medians[kind] / medians["network"], medians["loop"] / medians[kind]
    figures = (
        f"{share:.4%} of a ResNet-18 forward at {PIXELS} pixels, {speedup:.0f} times as fast as a loop over images"
    )
    record_property("figures", f"correction ({kind}) of {BATCH} images: {figures}")
    assert share < MAX_SHARE
    assert speedup >= MIN_SPEEDUP
