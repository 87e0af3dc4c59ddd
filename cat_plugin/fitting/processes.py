"""Several processes that each feed their own share of the images (`torchrun`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

from cat_plugin.errors import CATError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """Those that work on one fit: this one alone, or all of `torch.distributed`.

    device: where communication takes place; the CPU with gloo, the model's device with a backend of accelerators.
    """

    several: bool = False
    device: torch.device | None = None

    @classmethod
    def all(cls, device: torch.device | None) -> "Processes":
        """All processes, where `torch.distributed` is initialised with more than one; their models are on `device`."""
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return cls()
        on_cpu = "gloo" in distributed.get_backend() or device is None
        return cls(several=True, device=torch.device("cpu") if on_cpu else device)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks; `rows` (N, ...) are on the CPU, N may differ."""
        if not self.several:
            return rows
        lengths = self._lengths(len(rows))
        padded = torch.zeros(max(lengths), *rows.shape[1:], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows.to(self.device)
        parts = [torch.empty_like(padded) for _ in lengths]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:length].cpu() for part, length in zip(parts, lengths, strict=True)])

    def rows_before(self, count: int) -> int:
        """How many rows the processes of lower rank have, if this one has `count`."""
        return sum(self._lengths(count)[: distributed.get_rank()]) if self.several else 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values`, on the CPU, over all processes."""
        if not self.several:
            return values
        total = values.to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.cpu()

    def agree(self, value: Value) -> Value:
        """What the first process has; rounding may differ from machine to machine."""
        if not self.several:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes come through the block, or all of them raise.

        Raises:
            CATError: another process raised inside of the block.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            failures = int(self.sum(torch.tensor(int(failed))))
        if failures:
            raise CATError(f"{failures} other processes could not collect their outputs; their errors say why")

    def _lengths(self, count: int) -> list[int]:
        length = torch.tensor([count], device=self.device)
        lengths = [torch.empty_like(length) for _ in range(distributed.get_world_size())]
        distributed.all_gather(lengths, length)
        return [int(length) for length in lengths]


ALONE = Processes()
