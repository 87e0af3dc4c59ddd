"""Collecting paired logits, against running both models on the same batches and against a copy of their outputs.

Most of what is added to large models comes once a call, however many batches there are: a digest of all parameters and
buffers of both models, before and after, by which a change of them is noticed.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from benchmarks.perf.timings import Medians, copy_of, normal, processor_time
from cat_plugin.running.collect import collect_outputs

CLASSES, BATCH, BATCHES, PIXELS, INPUTS = 1000, 64, 4, 64, 16
MAX_ADDED = 0.4
"""Of the time that both networks take, timings of which vary by more than what is added."""

pytestmark = processor_time
medians = Medians()


def linear(seed: int) -> nn.Module:
    """Next to nothing to run, so that what collecting adds can be seen."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(INPUTS, CLASSES), nn.Identity())


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return resnet18(weights=None)


KINDS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "a linear layer": (linear, (INPUTS,)),
    f"ResNet-18, {PIXELS} pixels": (network, (3, PIXELS, PIXELS)),
}


def made(kind: str) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """Two models and batches for them."""
    make, shape = KINDS[kind]
    return make(0).eval(), make(1).eval(), [normal(BATCH, *shape, seed=index) for index in range(BATCHES)]


def rounds(kind: str) -> dict[str, int]:
    return {"rounds": 50 if kind == "a linear layer" else 7, "warmup_rounds": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_both_models_alone(benchmark, kind):
    first, second, batches = made(kind)

    @torch.no_grad()
    def run() -> None:
        for batch in batches:
            first(batch)
            second(batch)

    benchmark.pedantic(run, **rounds(kind))
    medians.keep(f"{kind} alone", benchmark)


@pytest.mark.parametrize("kind", KINDS)
def test_collecting(benchmark, kind):
    benchmark.pedantic(collect_outputs, made(kind), **rounds(kind))
    medians.keep(kind, benchmark)


def test_copy(benchmark):
    benchmark(copy_of(*(normal(BATCH * BATCHES, CLASSES, seed=seed) for seed in (0, 1))))
    medians.keep("copy", benchmark)


@pytest.mark.parametrize("kind", KINDS)
def test_what_collecting_adds(kind, record_property):
    if not {kind, f"{kind} alone", "copy"} <= set(medians):
        pytest.skip("needs the timings of the tests above in one run")
    both, alone = medians[kind], medians[f"{kind} alone"]
    added = both - alone
    figures = (
        f"{1e3 * both:.1f} ms, {1e3 * added:+.1f} ms ({added / alone:+.0%}) on top of running both models, as long as "
        f"{added / medians['copy']:,.0f} plain copies of their outputs"
    )
    record_property("figures", f"collecting ({kind}, {BATCHES} batches of {BATCH}): {figures}")
    if kind != "a linear layer":
        assert added / alone < MAX_ADDED
