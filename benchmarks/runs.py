"""A run is a folder that remembers its settings; finished rows are kept, so that a stopped run resumes."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from safetensors import SafetensorError
from tqdm import tqdm

from benchmarks import BenchmarkError
from benchmarks.files import digest_text, write_text

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"


class Cell(Protocol):
    """One cell of a grid; its ``name`` is unique in the grid and fit for a file name."""

    @property
    def name(self) -> str: ...


class Record(Protocol):
    """What is measured for a cell: ``store(path)`` writes a JSON file, whole or not at all, ``load(path)`` reads it."""

    def store(self, path: Path) -> None: ...

    @classmethod
    def load(cls, path: Path) -> "Record": ...


AnyCell = TypeVar("AnyCell", bound=Cell)
AnyRecord = TypeVar("AnyRecord", bound=Record)


class Rows(Generic[AnyRecord]):
    """Records of one type, each in a file of ``folder`` that is named after its cell."""

    def __init__(self, folder: Path, kind: type[AnyRecord]) -> None:
        self.folder = folder
        self.kind = kind

    def finished(self, grid: Sequence[Cell]) -> dict[str, AnyRecord]:
        """What is stored of ``grid``, by the name of the cell."""
        found = {}
        for cell in grid:
            path = self._path(cell)
            if not path.is_file():
                continue
            try:
                found[cell.name] = self.kind.load(path)
            except (ValueError, TypeError, AttributeError, OSError, SafetensorError) as error:
                logger.warning("measuring again, the stored row %s is unreadable: %s", path.stem, error)
        return found

    def complete(
        self, grid: Sequence[AnyCell], measure: Callable[[AnyCell], AnyRecord], *, progress: bool = False
    ) -> list[AnyRecord]:
        """Measure what is not finished, storing it at once; all records in the order of ``grid``."""
        found = self.finished(grid)
        pending = [cell for cell in grid if cell.name not in found]
        with tqdm(pending, unit="row", disable=not progress or not pending) as bar:
            for cell in bar:
                bar.set_description(cell.name)
                found[cell.name] = measure(cell)
                found[cell.name].store(self._path(cell))
        return [found[cell.name] for cell in grid]

    def forget(self, grid: Sequence[Cell]) -> None:
        """Delete what is stored of ``grid``."""
        for cell in grid:
            self._path(cell).unlink(missing_ok=True)

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"


def open_run(
    results: Path, subject: str, settings: dict[str, Any], *, name: str | None = None, fresh: bool = False
) -> Path:
    """Start a run or come back to it: the folder ``<results>/<name>``.

    Args:
        results: the folder of all runs.
        subject: what is measured, in a word; a name that is derived from the settings starts with it.
        settings: all that figures depend on, as JSON types.
        name: name of the run; by default it is derived from the settings.
        fresh: forget what the folder holds.

    Raises:
        BenchmarkError: ``name`` is no plain folder name, or that folder belongs to other settings or is no run.
    """
    text = json.dumps(settings, indent=2, sort_keys=True)
    name = name or f"{subject}-{digest_text(text)[:8]}"
    if Path(name).name != name or name in (".", ".."):
        raise BenchmarkError(f"the name of a run must be a plain folder name, got {name!r}")
    folder = results / name
    _claim(folder, json.loads(text), fresh)
    write_text(folder / SETTINGS_FILE, text + "\n")
    return folder


def _claim(folder: Path, settings: dict[str, Any], fresh: bool) -> None:
    """Refuse a folder of something else; empty it if ``fresh``."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        stored = json.loads((folder / SETTINGS_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        raise BenchmarkError(f"{folder} exists and is not a benchmark run; choose another --run") from None
    if fresh:
        shutil.rmtree(folder)
    elif stored != settings:
        keys = sorted(key for key in stored.keys() | settings.keys() if stored.get(key) != settings.get(key))
        changes = "; ".join(f"{key}: {stored.get(key)} then, {settings.get(key)} now" for key in keys)
        raise BenchmarkError(
            f"{folder} was made with other settings ({changes}); choose another --run, or --fresh to redo it"
        )
