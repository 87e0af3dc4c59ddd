"""Command line: ``python -m benchmarks report`` makes the tables of runs again, without running models."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError, ablate, compare, robustness
from benchmarks.command import exit_code
from benchmarks.options import parse_report
from benchmarks.runs import read_settings

KINDS: dict[str, Callable[[Path, dict[str, Any]], tuple[str, dict[str, bool]]]] = {
    module.NAME: module.recompute for module in (compare, ablate, robustness)
}


def main(argv: Sequence[str]) -> int:
    """Run the command line; the exit code is 2 for input that the user can put right, 130 for an interruption."""
    return exit_code(lambda: _report(parse_report(list(argv))), resumes=False)


def _report(args: argparse.Namespace) -> None:
    """Every figure is computed from predictions of single images; a row that says otherwise is an error."""
    for folder in args.runs:
        settings = read_settings(folder)
        kind = settings.get("kind", compare.NAME)  # runs of earlier versions do not say
        if kind not in KINDS or "grid" not in settings:
            raise BenchmarkError(f"{folder} is no run of {', '.join(KINDS)}")
        text, files = KINDS[kind](folder, settings)
        state = ", ".join(f"{name} ({'the same' if same else 'written'})" for name, same in files.items())
        print(f"{text}\n\n{folder}: {state}")
