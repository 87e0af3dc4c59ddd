"""The folder of a run: it remembers the settings, and says where and by what command figures were made."""

import json
import shutil
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.runs.environment import describe_machine
from benchmarks.runs.files import digest_text, write_text

SETTINGS_FILE = "settings.json"
PARTIAL = ".part"  # ending of the names under which files are written


def open_run(
    results: Path, subject: str, settings: dict[str, Any], *, name: str | None = None, fresh: bool = False
) -> Path:
    """Start a run or come back to it: the folder `<results>/<name>`.

    Args:
        results: the folder of all runs.
        subject: what is measured, in a word; a name that is derived from the settings starts with it.
        settings: all that figures depend on, as JSON types.
        name: name of the run; by default it is derived from the settings.
        fresh: forget what the folder holds.

    Raises:
        BenchmarkError: `name` is no plain folder name, or that folder belongs to other settings or is no run.
    """
    text = json.dumps(settings, indent=2, sort_keys=True)
    name = name or f"{subject}-{digest_text(text)[:8]}"
    if Path(name).name != name or name in (".", ".."):
        raise BenchmarkError(f"the name of a run must be a plain folder name, got {name!r}")
    folder = results / name
    _claim(folder, json.loads(text), fresh)
    write_text(folder / SETTINGS_FILE, text + "\n")
    return folder


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        BenchmarkError: the folder is no run.
    """
    try:
        found = json.loads((folder / SETTINGS_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise BenchmarkError(f"{folder} is not the folder of a run: it has no readable {SETTINGS_FILE}")
    return found


def _claim(folder: Path, settings: dict[str, Any], fresh: bool) -> None:
    """Refuse a folder of something else; empty it if `fresh`."""
    # A run that was killed while it wrote its first file has left the temporary name of that.
    if not folder.exists() or all(entry.name.endswith(PARTIAL) for entry in folder.iterdir()):
        return
    try:
        stored = read_settings(folder)
    except BenchmarkError:
        raise BenchmarkError(f"{folder} exists and is not a benchmark run; choose another --run") from None
    if fresh:
        shutil.rmtree(folder)
    elif stored != settings:
        keys = sorted(key for key in stored.keys() | settings.keys() if stored.get(key) != settings.get(key))
        changes = "; ".join(f"{key}: {stored.get(key)} then, {settings.get(key)} now" for key in keys)
        raise BenchmarkError(
            f"{folder} was made with other settings ({changes}); choose another --run, or --fresh to redo it"
        )


def environment(command: str, seeds: Sequence[int], device: str, seconds: float) -> dict[str, Any]:
    """What is worth knowing about a run, besides its settings; `seconds` is what all rows took to measure."""
    return {
        "command": command,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "seeds": list(seeds),
        **describe_machine(device),
    }


def write_environment(folder: Path, environment: dict[str, Any]) -> None:
    """Write `environment.json`; where there is one, it stays that of the first call but for `seconds`."""
    path = folder / "environment.json"
    try:
        first = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        first = {}
    kept = {**environment, **first, "seconds": environment["seconds"]}
    write_text(path, json.dumps(kept, indent=2) + "\n")
