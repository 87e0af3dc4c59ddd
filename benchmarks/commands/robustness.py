"""Command line: `python -m benchmarks robustness` fits corrections on many small draws and shows how they spread."""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.commands.exit_codes import command_line
from benchmarks.commands.fits import draw_rows, load_sources, run_fits
from benchmarks.commands.parsers import parse_robustness
from benchmarks.datasets.registry import DATASETS
from benchmarks.measure.draws import cells
from benchmarks.reports.robustness_report import shortfalls, to_markdown, write_report

NAME = "robustness"


def _measure_grid(args: argparse.Namespace) -> None:
    """Measure every source, number of images, draw and mode, then write and print the tables."""
    # Of a million images in files, only those that are drawn run through the networks.
    in_files = args.dataset is not None and DATASETS[args.dataset].in_files
    sources = load_sources(args, max(args.images) * args.max_draws if in_files else None)
    notes = shortfalls(sources, args.images, args.max_draws)
    grid = cells(sources, args.images, args.max_draws)
    if not grid:
        raise BenchmarkError(f"not one draw of {min(args.images):,} images fits; {' '.join(notes)}")
    print("\n".join(notes), flush=True)
    run_fits(args, NAME, sources, grid, recompute, notes=notes)


main = command_line(NAME, parse_robustness, _measure_grid, resumes=True)


def recompute(folder: Path, settings: dict[str, Any]) -> tuple[str, dict[str, bool]]:
    """The tables and the files of a run, from its stored predictions; see `write_report` for the files."""
    gains = [draw.row for draw in draw_rows(folder).stored(settings["grid"])]
    return to_markdown(gains, settings["notes"]), write_report(folder, gains, settings["notes"])
