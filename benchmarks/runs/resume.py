"""Finished rows are kept, so that a stopped run resumes, and several processes may share the work."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from safetensors import SafetensorError
from tqdm import tqdm

from benchmarks import BenchmarkError
from benchmarks.runs.processes import Process, claimed
from benchmarks.runs.row_files import Record

logger = logging.getLogger(__name__)

PAUSE = 1.0  # seconds between looks at what other processes are measuring


class Cell(Protocol):
    """One cell of a grid; its `name` is unique in the grid and fit for a file name."""

    @property
    def name(self) -> str: ...


AnyCell = TypeVar("AnyCell", bound=Cell)
AnyRecord = TypeVar("AnyRecord", bound=Record)


class Rows(Generic[AnyRecord]):
    """Records of one type, each in a file of `folder` that is named after its cell.

    What `shared` holds, another folder of rows, need not be measured again; what is measured goes there, too.
    """

    def __init__(self, folder: Path, kind: type[AnyRecord], shared: Path | None = None) -> None:
        self.folder = folder
        self.kind = kind
        self.shared = None if shared is None else Rows(shared, kind)

    def finished(self, names: Sequence[str]) -> dict[str, AnyRecord]:
        """What is stored of the cells with these names."""
        found = {name: self._read(name) for name in names}
        return {name: record for name, record in found.items() if record is not None}

    def stored(self, names: Sequence[str]) -> list[AnyRecord]:
        """The records of a finished run.

        Raises:
            BenchmarkError: rows are missing or unreadable, or hold other figures than their predictions give.
        """
        found = self.finished(names)
        missing = [name for name in names if name not in found]
        if missing:
            raise BenchmarkError(
                f"{self.folder} lacks {len(missing)} of {len(names)} rows, such as {missing[0]}; the command that "
                "started the run finishes it"
            )
        for name, record in found.items():
            record.verify(name)
        return [found[name] for name in names]

    def complete(
        self, grid: Sequence[AnyCell], measure: Callable[[AnyCell], AnyRecord], *, progress: bool = False
    ) -> list[AnyRecord]:
        """Measure what is not finished, storing it at once; all records in the order of `grid`."""
        found = self.finished([cell.name for cell in grid])
        pending = [cell for cell in grid if cell.name not in found]
        with tqdm(pending, unit="row", disable=not progress or not pending) as bar:
            for cell in bar:
                bar.set_description(cell.name)
                found[cell.name] = measure(cell)
                self._store(cell.name, found[cell.name])
        return [found[cell.name] for cell in grid]

    def complete_together(
        self,
        grid: Sequence[AnyCell],
        measure: Callable[[AnyCell], AnyRecord],
        process: Process,
        *,
        progress: bool = False,
    ) -> list[AnyRecord] | None:
        """As `complete`, by several processes, which each take cells that no other one is at.

        The first process ends with all records, and waits for them; what another one that has died has left, it
        measures itself. The others end, with None, when all cells are finished or claimed.
        """
        if process.alone:
            return self.complete(grid, measure, progress=progress)
        # Every one starts with its own share, so that they seldom meet.
        shares = [grid[(process.rank + shift) % process.world :: process.world] for shift in range(process.world)]
        pending = [cell for share in shares for cell in share]
        with tqdm(total=len(grid), unit="row", disable=not progress) as bar:
            while pending:
                for cell in pending:
                    self._measure_unclaimed(cell, measure)
                pending = [cell for cell in pending if not self._path(cell.name).is_file()]
                bar.update(len(grid) - len(pending) - bar.n)
                if not process.first:
                    return None
                if pending:
                    time.sleep(PAUSE)
        return self.complete(grid, measure)

    def _measure_unclaimed(self, cell: AnyCell, measure: Callable[[AnyCell], AnyRecord]) -> None:
        if self._read(cell.name) is not None:
            return
        with claimed(self.folder / f".{cell.name}.lock") as free:
            # Another process may have finished it between the line above and the claim.
            if free and self._read(cell.name) is None:
                self._store(cell.name, measure(cell))

    def forget(self, names: Sequence[str]) -> None:
        """Delete what is stored of the cells with these names."""
        for name in names:
            self._path(name).unlink(missing_ok=True)
        if self.shared is not None:
            self.shared.forget(names)

    def _read(self, name: str) -> AnyRecord | None:
        path = self._path(name)
        if path.is_file():
            try:
                return self.kind.load(path)
            except (ValueError, TypeError, AttributeError, OSError, SafetensorError) as error:
                logger.warning("measuring again, the stored row %s is unreadable: %s", name, error)
        found = None if self.shared is None else self.shared._read(name)
        if found is not None:
            found.store(path)
        return found

    def _store(self, name: str, record: AnyRecord) -> None:
        record.store(self._path(name))
        if self.shared is not None:
            self.shared._store(name, record)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
