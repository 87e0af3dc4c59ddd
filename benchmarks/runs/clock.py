"""The clock that the cost of a step is read from."""

import time

import torch


def clock(device: str | torch.device) -> float:
    """Seconds, of which differences count: of the processor, which other programs do not slow down, or where `device`
    is an accelerator, of the wall."""
    return time.process_time() if torch.device(device).type == "cpu" else time.perf_counter()
