"""Several processes that each feed their own share of the images (`torchrun`)."""

import torch
from torch import Tensor, distributed


def gather_rows(rows: Tensor, device: torch.device | None) -> Tensor:
    """The rows of all processes, in the order of their ranks; `rows` itself where there is one process.

    Args:
        rows: (N, ...) on the CPU; N may differ between processes, and be 0.
        device: where communication takes place if the backend works on accelerators only.
    """
    if not _several():
        return rows
    where = _place(device)
    lengths = _lengths(len(rows), where)
    padded = torch.zeros(max(lengths), *rows.shape[1:], dtype=rows.dtype, device=where)
    padded[: len(rows)] = rows.to(where)
    parts = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:length].cpu() for part, length in zip(parts, lengths, strict=True)])


def rows_before(count: int, device: torch.device | None) -> int:
    """How many rows the processes of lower rank have, if this one has `count`."""
    return sum(_lengths(count, _place(device))[: distributed.get_rank()]) if _several() else 0


def reduce_sum(values: Tensor, device: torch.device | None) -> Tensor:
    """The sum of `values`, on the CPU, over all processes."""
    if not _several():
        return values
    total = values.to(_place(device), copy=True)
    distributed.all_reduce(total)
    return total.cpu()


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _place(device: torch.device | None) -> torch.device:
    return torch.device("cpu") if "gloo" in distributed.get_backend() or device is None else device


def _lengths(count: int, where: torch.device) -> list[int]:
    length = torch.tensor([count], device=where)
    lengths = [torch.empty_like(length) for _ in range(distributed.get_world_size())]
    distributed.all_gather(lengths, length)
    return [int(length) for length in lengths]
