"""Several processes that each feed their own share of the images (`torchrun`)."""

import torch
from torch import Tensor, distributed


def gather_rows(rows: Tensor, device: torch.device | None) -> Tensor:
    """The rows of all processes, in the order of their ranks; `rows` itself where there is one process.

    Args:
        rows: (N, ...) on the CPU; N may differ between processes, and be 0.
        device: where communication takes place if the backend works on accelerators only.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows
    where = torch.device("cpu") if "gloo" in distributed.get_backend() else device
    length = torch.tensor([len(rows)], device=where)
    lengths = [torch.empty_like(length) for _ in range(distributed.get_world_size())]
    distributed.all_gather(lengths, length)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, *rows.shape[1:], dtype=rows.dtype, device=where)
    padded[: len(rows)] = rows.to(where)
    parts = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(parts, padded)
    return torch.cat([part[: int(length)].cpu() for part, length in zip(parts, lengths, strict=True)])
