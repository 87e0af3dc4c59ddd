"""What a reconstruction has finished, unit by unit, in a folder: a run that was stopped goes on from there."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from baselines.files import atomic_path

_RUN_FILE = "run.json"
_GENERATOR = "generator"
_STATE = "state."
_SHOWN = 60  # characters of a value in an error


class Checkpoint:
    """The folder of one run; use `open`.

    `run.json` says which run it is. Each finished unit of each stage has a safetensors file with the unit's
    `state_dict` as it was then, and the state of the random generator behind it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def open(cls, folder: Path, run: Mapping[str, object]) -> "Checkpoint":
        """Start a folder, or come back to it.

        Args:
            folder: need not exist.
            run: all that the result depends on, as JSON types.

        Raises:
            ValueError: the folder belongs to another run, which the message tells apart, or is no checkpoint.
        """
        text = json.dumps(run, indent=2)
        path = folder / _RUN_FILE
        if path.is_file():
            _refuse_another(folder, path, json.loads(text))
        elif folder.exists() and (not folder.is_dir() or not all(map(_is_left_over, folder.iterdir()))):
            raise ValueError(f"checkpoint={str(folder)!r} is no checkpoint and not empty; give another folder")
        else:
            with atomic_path(path) as temporary:
                temporary.write_text(text + "\n", "utf-8")
        return cls(folder)

    def finished(self, stage: int) -> int:
        """How many units of the stage are finished, from the first one on."""
        count = 0
        while self._path(stage, count).is_file():
            count += 1
        return count

    def save(self, stage: int, index: int, unit: nn.Module, generator: torch.Generator) -> None:
        """Keep a finished unit."""
        tensors = {
            f"{_STATE}{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in unit.state_dict().items()
            if isinstance(tensor, Tensor)
        }
        with atomic_path(self._path(stage, index)) as temporary:
            save_file(tensors | {_GENERATOR: generator.get_state()}, temporary)

    def restore(self, stage: int, index: int, unit: nn.Module, generator: torch.Generator) -> None:
        """Make `unit` and `generator` as they were when the unit was finished.

        Raises:
            ValueError: the file is damaged, or of another network.
        """
        path = self._path(stage, index)
        try:
            tensors = load_file(path)
            generator.set_state(tensors.pop(_GENERATOR))
            extra = {name: value for name, value in unit.state_dict().items() if not isinstance(value, Tensor)}
            unit.load_state_dict({name.removeprefix(_STATE): tensor for name, tensor in tensors.items()} | extra)
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and the run goes on from there") from error

    def _path(self, stage: int, index: int) -> Path:
        return self._folder / f"stage{stage + 1}-unit{index + 1:04d}.safetensors"


def _is_left_over(path: Path) -> bool:
    """Whether this is the run's description, half written when an earlier try was killed."""
    return path.match(f".{_RUN_FILE}.*.part")


def _refuse_another(folder: Path, path: Path, run: Mapping[str, object]) -> None:
    try:
        stored = json.loads(path.read_text("utf-8"))
        differing = [key for key in stored.keys() | run.keys() if stored.get(key) != run.get(key)]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); give another folder, or delete this one") from error
    if "method" in differing:
        differing = [key for key in differing if key != "recipe"]  # which says the same at length
    if differing:
        changes = "; ".join(
            f"{key}: {_short(stored.get(key))} then, {_short(run.get(key))} now" for key in sorted(differing)
        )
        raise ValueError(
            f"checkpoint={str(folder)!r} is of another run ({changes}); give another folder, or delete it to start anew"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
