"""Command line: `python -m benchmarks ablate` changes one setting of the correction at a time."""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.commands.exit_codes import command_line
from benchmarks.commands.fits import draw_rows, load_sources, run_fits
from benchmarks.commands.parsers import parse_ablate
from benchmarks.measure.factors import points, unique_cells
from benchmarks.reports.ablation_report import Line, to_markdown, write_report
from benchmarks.reports.robustness_report import shortfalls

NAME = "ablate"


def _measure_grid(args: argparse.Namespace) -> None:
    """Measure every source, factor, value, mode and draw, then write and print the tables."""
    sizes = sorted({args.n_cat, *args.factors.get("images", ()), *args.factors.get("layers-images", ())})
    sources = load_sources(args, most=max(sizes) * args.max_draws)
    found = points(sources, args.factors, args.n_cat, args.max_draws)
    notes = shortfalls(sources, sizes, args.max_draws)
    if not found:
        raise BenchmarkError(f"there is nothing to fit; {' '.join(notes)}")
    listed = [[point.factor, point.value, point.cell.name] for point in found]
    run_fits(args, NAME, sources, unique_cells(found), recompute, points=listed, notes=notes)


main = command_line(NAME, parse_ablate, _measure_grid, resumes=True)


def recompute(folder: Path, settings: dict[str, Any]) -> tuple[str, dict[str, bool]]:
    """The tables and the files of a run, from its stored predictions; see `write_report` for the files."""
    stored = dict(zip(settings["grid"], draw_rows(folder).stored(settings["grid"]), strict=True))
    lines = [Line(factor=factor, value=value, **vars(stored[name].row)) for factor, value, name in settings["points"]]
    return to_markdown(lines, settings["notes"]), write_report(folder, lines, settings["notes"])
