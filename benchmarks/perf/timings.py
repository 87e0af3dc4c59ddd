"""What the timings share: logits to time on, the plain copy that bounds them, and medians to make ratios of."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

processor_time = pytest.mark.benchmark(timer=time.process_time)
"""Of the tests' own process, so that what else runs on a machine disturbs little; with one thread, see `conftest`."""


class Medians(dict[str, float]):
    """Seconds, by what was timed in one run of a module's tests."""

    def keep(self, name: str, benchmark: Any) -> None:
        """Take the median of a `benchmark` fixture that has run; none where timing is off (--benchmark-disable)."""
        if benchmark.stats is not None:
            self[name] = benchmark.stats.stats.median


def normal(*shape: int, seed: int) -> Tensor:
    """Of logits, images or weights, whose values do not matter."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def paired_logits(n_images: int, n_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Quantized and full-precision logits, both (N, C) float32, in 64 groups, so that k-means finds something."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(64, n_classes, generator=generator)
    groups = torch.randint(64, (n_images,), generator=generator)
    f = centres[groups] + torch.randn(n_images, n_classes, generator=generator)
    return 0.8 * f + 0.3 + 0.7 * torch.randn(n_images, n_classes, generator=generator), f


def copy_of(*tensors: Tensor) -> Callable[[], None]:
    """A call that copies tensors into memory that is there already: reading and writing them once, and nothing else."""
    copies = [torch.empty_like(tensor) for tensor in tensors]

    def call() -> None:
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor)

    return call
