"""Several processes that share the cells of one run, as `torchrun` starts them.

They meet in the folder of the run alone: no process group is made, which would make corrections be fitted together.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from benchmarks import BenchmarkError


@dataclass(frozen=True, kw_only=True)
class Process:
    """Number `rank` of `world` processes, and number `local_rank` of the `local_world` on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes and prints the report."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1


def this_process(environment: Mapping[str, str] = os.environ) -> Process:
    """What `torchrun` says in the environment; one process where it says nothing.

    Raises:
        BenchmarkError: the variables are no numbers that go together.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return Process()
    defaults = {"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    values = {name: environment.get(name, default) for name, default in defaults.items()}
    if (
        not all(value.isascii() and value.isdigit() for value in values.values())
        or not int(values["RANK"]) < int(values["WORLD_SIZE"])
        or int(values["LOCAL_WORLD_SIZE"]) < 1
    ):
        found = ", ".join(f"{name}={value}" for name, value in values.items())
        raise BenchmarkError(f"{found} in the environment are not what torchrun sets: whole numbers, RANK < WORLD_SIZE")
    rank, world, local_rank, local_world = map(int, values.values())
    return Process(rank=rank, world=world, local_rank=local_rank, local_world=local_world)


def local_device(text: str, process: Process) -> torch.device:
    """The device `text`; of several accelerators, where `text` names none, the one that is the process's own."""
    device = torch.device(text)
    if process.alone or device.index is not None or device.type == "cpu":
        return device
    return torch.device(device.type, process.local_rank)


def use_device(text: str, process: Process) -> None:
    """Make `text` mean `local_device` in this process, so that settings say the same in all of them.

    Figures of an accelerator are made to repeat as far as its library lets them: no search for the fastest kernels,
    the deterministic ones where there is a choice, and float32 that is not rounded to TF32.
    """
    device = local_device(text, process)
    backend = getattr(torch, device.type, None)
    if str(device) != text and hasattr(backend, "set_device"):
        backend.set_device(device.index)
    if device.type != "cpu":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")


def refuse_several(command: str, process: Process) -> None:
    """Raise `BenchmarkError` unless this is the only process."""
    if not process.alone:
        raise BenchmarkError(f"{command} runs in one process, got WORLD_SIZE={process.world}; torchrun is for compare")


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether nobody else is at the work that `path` stands for; if so, it is claimed inside the block.

    The claim is a lock on the file, which the system takes back when the process ends, however it ends.

    Raises:
        BenchmarkError: the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    except OSError as error:
        raise BenchmarkError(
            f"{path} cannot be locked ({error}); several processes need a folder with locks"
        ) from error
    try:
        yield True
    finally:
        with suppress(PermissionError):  # Windows deletes no open file; an empty one stays there
            path.unlink(missing_ok=True)
        lock.release()
