"""A run is a folder that remembers its settings and its finished rows, so that a stopped run resumes."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from baselines.files import atomic_path
from benchmarks import BenchmarkError
from benchmarks.evaluate import Measurement, Row, Setting
from benchmarks.files import digest_text, write_text

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
ROWS_FOLDER = "rows"
SECONDS = "seconds"  # stands beside the fields of a stored row


class Run:
    """The folder ``<results>/<name>`` of one set of settings; use :meth:`open`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, results: Path, settings: dict[str, Any], *, name: str | None = None, fresh: bool = False) -> "Run":
        """Start a run or come back to it.

        Args:
            results: the folder of all runs.
            settings: all that figures depend on, as JSON types; has ``dataset`` and ``model``.
            name: name of the run; by default it is derived from the settings.
            fresh: forget what the run has finished.

        Raises:
            BenchmarkError: ``name`` is no plain folder name, or that folder belongs to other settings or is no run.
        """
        text = json.dumps(settings, indent=2, sort_keys=True)
        name = name or f"{settings['dataset']}-{settings['model']}-{digest_text(text)[:8]}"
        if Path(name).name != name or name in (".", ".."):
            raise BenchmarkError(f"the name of a run must be a plain folder name, got {name!r}")
        run = cls(results / name)
        run._claim(json.loads(text), fresh)
        write_text(run.folder / SETTINGS_FILE, text + "\n")
        return run

    def finished(self) -> dict[str, Measurement]:
        """What is stored, by the name of the setting."""
        found = {}
        for path in sorted((self.folder / ROWS_FOLDER).glob("*.json")):
            try:
                values = json.loads(path.read_text("utf-8"))
                seconds = values.pop(SECONDS, 0.0)
                found[path.stem] = Measurement(Row(**values), load_file(path.with_suffix(".safetensors")), seconds)
            except (ValueError, TypeError, AttributeError, OSError, SafetensorError) as error:
                logger.warning("measuring again, the stored row %s is unreadable: %s", path.stem, error)
        return found

    def complete(
        self, grid: Sequence[Setting], measure: Callable[[Setting], Measurement], *, progress: bool = False
    ) -> list[Measurement]:
        """Measure what is not finished, storing it at once; all measurements in the order of ``grid``."""
        found = self.finished()
        pending = [setting for setting in grid if setting.name not in found]
        with tqdm(pending, unit="setting", disable=not progress or not pending) as bar:
            for setting in bar:
                bar.set_description(setting.name)
                found[setting.name] = measure(setting)
                self._store(setting.name, found[setting.name])
        return [found[setting.name] for setting in grid]

    def _store(self, name: str, measurement: Measurement) -> None:
        """The row last: where it is, the predictions are, too."""
        folder = self.folder / ROWS_FOLDER
        with atomic_path(folder / f"{name}.safetensors") as temporary:
            save_file(measurement.predictions, temporary)
        values = {**asdict(measurement.row), SECONDS: measurement.seconds}
        write_text(folder / f"{name}.json", json.dumps(values, indent=2) + "\n")

    def _claim(self, settings: dict[str, Any], fresh: bool) -> None:
        """Refuse a folder of something else; empty it if ``fresh``."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        try:
            stored = json.loads((self.folder / SETTINGS_FILE).read_text("utf-8"))
        except (OSError, ValueError):
            raise BenchmarkError(f"{self.folder} exists and is not a benchmark run; choose another --run") from None
        if fresh:
            shutil.rmtree(self.folder)
        elif stored != settings:
            keys = sorted(key for key in stored.keys() | settings.keys() if stored.get(key) != settings.get(key))
            changes = "; ".join(f"{key}: {stored.get(key)} then, {settings.get(key)} now" for key in keys)
            raise BenchmarkError(
                f"{self.folder} was made with other settings ({changes}); choose another --run, or --fresh to redo it"
            )
