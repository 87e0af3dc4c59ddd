"""Command line: ``python -m benchmarks ablate`` changes one setting of the correction at a time."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.commands.command import environment, exit_code
from benchmarks.commands.fits import draw_rows, fit_draws, fit_settings, load_sources, subject
from benchmarks.commands.options import parse_ablate
from benchmarks.measure.factors import points, unique_cells
from benchmarks.reports.ablation_report import Line, to_markdown, write_report
from benchmarks.reports.report import write_environment
from benchmarks.reports.robustness_report import shortfalls
from benchmarks.runs.runs import open_run

NAME = "ablate"


def main(argv: Sequence[str]) -> int:
    """Run the command line; the exit code is 2 for input that the user can put right, 130 for an interruption."""
    return exit_code(lambda: _measure_grid(parse_ablate(list(argv)), argv), resumes=True)


def _measure_grid(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure every source, factor, value, mode and draw, then write and print the tables."""
    sizes = sorted({args.n_cat, *args.factors.get("images", ())})
    sources = load_sources(args, most=max(sizes) * args.max_draws)
    found = points(sources, args.factors, args.n_cat, args.max_draws)
    notes = shortfalls(sources, sizes, args.max_draws)
    if not found:
        raise BenchmarkError(f"there is nothing to fit; {' '.join(notes)}")
    grid = unique_cells(found)
    listed = [[point.factor, point.value, point.cell.name] for point in found]
    settings = fit_settings(NAME, sources, grid, points=listed, notes=notes)
    folder = open_run(args.results, subject(args, NAME), settings, name=args.run, fresh=args.fresh)
    draws = fit_draws(args, folder, grid)
    write_environment(folder, environment(NAME, argv, args, sum(draw.seconds for draw in draws)) | settings)
    text, written = recompute(folder, settings)
    print(f"\n{text}\n\nwritten to {folder}: {', '.join(written)}, environment.json")


def recompute(folder: Path, settings: dict[str, Any]) -> tuple[str, dict[str, bool]]:
    """The tables and the files of a run, from its stored predictions; see :func:`write_report` for the files."""
    stored = dict(zip(settings["grid"], draw_rows(folder).stored(settings["grid"]), strict=True))
    lines = [Line(factor=factor, value=value, **vars(stored[name].row)) for factor, value, name in settings["points"]]
    return to_markdown(lines, settings["notes"]), write_report(folder, lines, settings["notes"])
