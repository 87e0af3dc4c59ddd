"""Command line: `python -m benchmarks nulls` says how often a correction is accepted where nothing can be gained."""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.commands.exit_codes import command_line
from benchmarks.commands.fits import run_grid
from benchmarks.commands.parsers import parse_nulls
from benchmarks.measure.nulls import CASES, NullDraw, measure_null, null_cells
from benchmarks.reports.nulls_report import to_markdown, write_report
from benchmarks.runs.environment import code_digest, versions
from benchmarks.runs.files import digest_text
from benchmarks.runs.processes import refuse_several, this_process
from benchmarks.runs.resume import Rows

NAME = "nulls"


def _measure_grid(args: argparse.Namespace) -> None:
    """Fit every case, number of images and draw, then write and print the table."""
    refuse_several(NAME, this_process())
    grid = null_cells([CASES[name] for name in args.cases], args.draws, args.seed)
    digest = digest_text(code_digest(NullDraw.__module__), repr(versions()))
    settings = {"kind": NAME, "figures_digest": digest, "versions": versions(), "grid": [cell.name for cell in grid]}

    def rows(folder: Path) -> Rows[NullDraw]:
        return _rows(folder, args.cache / NAME / digest)

    run_grid(args, "-".join([NAME, *args.cases]), settings, grid, measure_null, rows, recompute, [args.seed])


main = command_line(NAME, parse_nulls, _measure_grid, resumes=True)


def recompute(folder: Path, settings: dict[str, Any]) -> tuple[str, dict[str, bool]]:
    """The table and the files of a run, from its stored predictions; see `write_report` for the files."""
    fits = [draw.row for draw in _rows(folder).stored(settings["grid"])]
    return to_markdown(fits), write_report(folder, fits)


def _rows(folder: Path, shared: Path | None = None) -> Rows[NullDraw]:
    return Rows(folder / "rows", NullDraw, shared)
