"""Fitting: the affine maps against loops, the recipe against scikit-learn and loops, selection against the recipe.

All of them against a plain copy of the logits, which no fit can beat.
"""

import numpy as np
import pytest
import torch

from benchmarks.perf import naive
from benchmarks.perf.timings import Medians, copy_of, paired_logits, processor_time
from cat_plugin import CATConfig, fit_cluster_affine
from cat_plugin.fitting.least_squares import fit_affine

IMAGES, CLASSES, CLUSTERS = 4096, 100, 64
PAPER = CATConfig.paper(CLUSTERS)
MIN_SPEEDUP = 5
"""Of the affine maps alone, against loops."""
MAX_SLOWDOWN = 1.5
"""Of the recipe with its clustering, against the naive one, most of whose time is in the same k-means."""
MAX_SELECTION = 400
"""Times the recipe: ten families in five folds, some of them minimised step by step."""

pytestmark = processor_time
medians = Medians()


@pytest.fixture(scope="module")
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    return paired_logits(IMAGES, CLASSES)


@pytest.fixture(scope="module")
def wide(logits) -> list[np.ndarray]:
    return [each.double().numpy() for each in logits]


@pytest.fixture(scope="module")
def ids(logits) -> torch.Tensor:
    return fit_cluster_affine(*logits, PAPER).assign(logits[0])


def test_copy(benchmark, logits):
    benchmark(copy_of(*logits))
    medians.keep("copy", benchmark)


def test_affine(benchmark, logits, ids):
    benchmark(fit_affine, *logits, ids, CLUSTERS)
    medians.keep("affine", benchmark)


def test_affine_in_loops(benchmark, wide, ids):
    benchmark.pedantic(naive.fit_affine, (*wide, ids.numpy(), CLUSTERS), rounds=5, warmup_rounds=1)
    medians.keep("affine in loops", benchmark)


def test_paper(benchmark, logits):
    benchmark.pedantic(fit_cluster_affine, (*logits, PAPER), rounds=11, warmup_rounds=1)
    medians.keep("paper", benchmark)


def test_paper_in_loops(benchmark, wide):
    benchmark.pedantic(naive.Paper.fit, (*wide, CLUSTERS), rounds=5, warmup_rounds=1)
    medians.keep("paper in loops", benchmark)


def test_selection(benchmark, logits):
    benchmark.pedantic(fit_cluster_affine, logits, rounds=3, warmup_rounds=1)
    medians.keep("selection", benchmark)


def needed(*names: str) -> list[float]:
    if not {"copy", *names} <= set(medians):
        pytest.skip("needs the timings of the tests above in one run")
    return [medians[name] for name in names]


@pytest.mark.parametrize(("ours", "least"), [("affine", MIN_SPEEDUP), ("paper", 1 / MAX_SLOWDOWN)])
def test_against_loops(ours, least, record_property):
    seconds, slow = needed(ours, f"{ours} in loops")
    record_property("figures", figures(ours, seconds, f"{slow / seconds:.1f} times as fast as in loops"))
    assert slow / seconds >= least


def test_selection_against_the_recipe(record_property):
    seconds, paper = needed("selection", "paper")
    record_property("figures", figures("selection", seconds, f"{seconds / paper:.0f} times the published recipe"))
    assert seconds / paper < MAX_SELECTION


def figures(name: str, seconds: float, rest: str) -> str:
    copies = seconds / medians["copy"]
    size = f"{IMAGES:,} images, {CLASSES} classes and {CLUSTERS} clusters"
    return f"fit ({name}) of {size}: {1e3 * seconds:.1f} ms, {rest}, as long as {copies:,.0f} plain copies of q and f"
