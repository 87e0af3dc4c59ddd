"""Times fit, selection, application and a plain copy at all sizes of `growth`, and writes the table to results/perf."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.perf.growth import READS, Size, lines, sizes, write_growth
from benchmarks.perf.timings import copy_of, normal, paired_logits, processor_time
from cat_plugin import CATConfig, ClusterAffine, fit_cluster_affine

FOLDER = Path("results") / "perf"
LARGE = 2**20
"""Logits, with which a selection takes so long that it is timed once."""

pytestmark = processor_time
seconds: dict[tuple[str, Size], float] = {}


def correction(size: Size) -> ClusterAffine:
    """One whose values do not matter."""
    shapes = (
        (size.classes, size.clusters),
        (size.clusters,),
        (size.clusters, size.classes),
        (size.clusters, size.classes),
    )
    return ClusterAffine(*(normal(*shape, seed=seed) for seed, shape in enumerate(shapes)))


def prepared(operation: str, size: Size) -> Callable[[], Any]:
    q, f = paired_logits(size.images, size.classes)
    if operation == "copy":
        return copy_of(q)
    if operation == "apply":
        module = correction(size)
        return torch.no_grad()(lambda: module(q))
    config = CATConfig.paper(size.clusters) if operation == "fit" else CATConfig(num_clusters=size.clusters)
    return lambda: fit_cluster_affine(q, f, config)


@pytest.mark.parametrize("size", sizes(), ids=str)
@pytest.mark.parametrize("operation", READS)
def test_call(benchmark, operation, size):
    call = prepared(operation, size)
    if operation == "selection":
        benchmark.pedantic(call, rounds=1 if size.images * size.classes > LARGE else 3)
    else:
        rounds = 5 if operation == "fit" else 15
        iterations = 10 if operation == "copy" else 1  # one copy of few logits is shorter than the clock is fine
        benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)
    if benchmark.stats is not None:
        seconds[operation, size] = benchmark.stats.stats.median


def test_growth(record_property):
    if len(seconds) < len(READS) * len(sizes()):
        pytest.skip("needs the timings of all sizes above in one run")
    text = write_growth(FOLDER, lines(seconds))
    record_property("figures", f"\n{text}\n\nwritten to {FOLDER}: growth.md, growth.csv")
