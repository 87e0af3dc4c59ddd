"""Command line: ``python -m benchmarks robustness`` fits corrections on many small draws and shows how they spread."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.commands.command import environment, exit_code
from benchmarks.commands.fits import draw_rows, fit_draws, fit_settings, load_sources, subject
from benchmarks.commands.options import parse_robustness
from benchmarks.datasets.imagenet import NAME as IMAGENET
from benchmarks.measure.draws import cells
from benchmarks.reports.report import write_environment
from benchmarks.reports.robustness_report import shortfalls, to_markdown, write_report
from benchmarks.runs.runs import open_run

NAME = "robustness"


def main(argv: Sequence[str]) -> int:
    """Run the command line; the exit code is 2 for input that the user can put right, 130 for an interruption."""
    return exit_code(lambda: _measure_grid(parse_robustness(list(argv)), argv), resumes=True)


def _measure_grid(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure every source, number of images, draw and mode, then write and print the tables."""
    # Of a million images, only those that are drawn run through the networks.
    sources = load_sources(args, max(args.images) * args.max_draws if args.dataset == IMAGENET else None)
    notes = shortfalls(sources, args.images, args.max_draws)
    grid = cells(sources, args.images, args.max_draws)
    if not grid:
        raise BenchmarkError(f"not one draw of {min(args.images):,} images fits; {' '.join(notes)}")
    settings = fit_settings(NAME, sources, grid, notes=notes)
    folder = open_run(args.results, subject(args, NAME), settings, name=args.run, fresh=args.fresh)
    print("\n".join(notes), flush=True)
    draws = fit_draws(args, folder, grid)
    write_environment(folder, environment(NAME, argv, args, sum(draw.seconds for draw in draws)) | settings)
    text, written = recompute(folder, settings)
    print(f"\n{text}\n\nwritten to {folder}: {', '.join(written)}, environment.json")


def recompute(folder: Path, settings: dict[str, Any]) -> tuple[str, dict[str, bool]]:
    """The tables and the files of a run, from its stored predictions; see :func:`write_report` for the files."""
    gains = [draw.row for draw in draw_rows(folder).stored(settings["grid"])]
    return to_markdown(gains, settings["notes"]), write_report(folder, gains, settings["notes"])
