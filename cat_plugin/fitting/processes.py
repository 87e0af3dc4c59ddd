"""Several processes that each feed their own share of the images (`torchrun`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from cat_plugin.errors import CATError

Value = TypeVar("Value")


class Processes:
    """Those that work on one fit: this one alone, or all of `torch.distributed`.

    All of them call the same methods in the same order. Every exchange begins with one of signs of life, so that one
    process that raises inside of `together` ends all: the others raise where they would have waited for it.

    Args:
        device: where communication takes place; the CPU with gloo, the model's device with a backend of accelerators.
            None: there is but this process.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.several = device is not None
        self.device = device
        self._parted = False

    @classmethod
    def all(cls, device: torch.device | None) -> "Processes":
        """All processes, where `torch.distributed` is initialised with more than one; their models are on `device`."""
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return cls()
        on_cpu = "gloo" in distributed.get_backend() or device is None
        return cls(torch.device("cpu") if on_cpu else device)

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        return distributed.get_rank() if self.several else 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in the order of their ranks."""
        if not self.several:
            return [value]
        self._meet()
        values: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks; `rows` (N, ...) are on the CPU, N may differ."""
        if not self.several:
            return rows
        lengths = self.gather(len(rows))
        padded = torch.zeros(max(lengths), *rows.shape[1:], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows.to(self.device)
        parts = [torch.empty_like(padded) for _ in lengths]
        self._meet()
        distributed.all_gather(parts, padded)
        return torch.cat([part[:length].cpu() for part, length in zip(parts, lengths, strict=True)])

    def before(self, count: int) -> int:
        """How many the processes of lower rank have, if this one has `count`."""
        return sum(self.gather(count)[: self.rank])

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values`, on the CPU, over all processes."""
        if not self.several:
            return values
        total = values.to(self.device, copy=True)
        self._meet()
        distributed.all_reduce(total)
        return total.cpu()

    def agree(self, value: Value) -> Value:
        """What the first process has; rounding may differ from machine to machine."""
        if not self.several:
            return value
        self._meet()
        values = [value]
        distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes come through the block, or all of them raise.

        Raises:
            CATError: another process raised inside of the block.
        """
        try:
            yield
        except BaseException:
            if self.several and not self._parted:
                self._meet(failed=True)
            raise
        if self.several:
            self._meet()

    def _meet(self, failed: bool = False) -> None:
        """Waits for all processes, and raises if another one has failed."""
        failures = torch.tensor(int(failed), device=self.device)
        distributed.all_reduce(failures)
        self._parted = bool(failures)
        if failures and not failed:
            raise CATError(f"{int(failures)} other processes failed, and this one cannot go on; their errors say why")


ALONE = Processes()
