"""The correction against the network that it corrects, a loop over images, and a plain copy of the logits.

`pytest benchmarks/perf` times all of them and then holds their medians against the bars. It is no part of the tests.
"""

from collections.abc import Iterator

import pytest
import torch
from torchvision.models import resnet18

from benchmarks.perf.naive import Paper
from benchmarks.perf.timings import Medians, copy_of, normal, processor_time
from cat_plugin import CATConfig, ClusterAffine, fit_cluster_affine

CLASSES, CLUSTERS, BATCH, PIXELS, IMAGES = 1000, 64, 64, 224, 1024
KINDS = ("paper", "auto")
MAX_SHARE = 0.001
"""Of a forward pass of ResNet-18."""
MIN_SPEEDUP = 8
"""Against a loop over images."""

MAX_COPIES = 400
"""Of the batch of logits."""

pytestmark = processor_time
medians = Medians()


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
    medians.keep("network", benchmark)


@pytest.mark.parametrize("kind", KINDS)
def test_correction(benchmark, kind):
    benchmark(make_correction(kind), normal(BATCH, CLASSES, seed=1))
    medians.keep(kind, benchmark)


def test_loop_over_images(benchmark):
    """As the published code does: PCA, `predict` and the map of its cluster for one image at a time."""
    q = normal(IMAGES, CLASSES, seed=0).numpy()
    paper = Paper.fit(q, q, CLUSTERS)
    benchmark(paper.apply, normal(BATCH, CLASSES, seed=1).numpy())
    medians.keep("loop", benchmark)


def test_copy(benchmark):
    benchmark(copy_of(normal(BATCH, CLASSES, seed=1)))
    medians.keep("copy", benchmark)


@pytest.mark.parametrize("kind", KINDS)
def test_bars(kind, record_property):
    """Of the medians above."""
    if set(medians) != {"network", "loop", "copy", *KINDS}:
        pytest.skip("needs the timings of all tests above in one run")
    share, speedup = medians[kind] / medians["network"], medians["loop"] / medians[kind]
    copies = medians[kind] / medians["copy"]
    figures = (
        f"{share:.4%} of a ResNet-18 forward at {PIXELS} pixels, {speedup:.0f} times as fast as a loop over images, "
        f"as long as {copies:.0f} plain copies of the logits"
    )
    record_property("figures", f"correction ({kind}) of {BATCH} images: {figures}")
    assert share < MAX_SHARE
    assert speedup >= MIN_SPEEDUP
    assert copies < MAX_COPIES
