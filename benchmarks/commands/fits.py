"""What the commands that fit many corrections share: where logits come from, and where finished fits are kept."""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.commands.loading import load_network
from benchmarks.datasets.dataset import Dataset
from benchmarks.measure.draws import Cell, Draw, measure
from benchmarks.measure.logit_files import file_sources
from benchmarks.measure.network_logits import network_sources
from benchmarks.measure.paired_logits import Source
from benchmarks.measure.protocol import Protocol, settings_grid
from benchmarks.runs.environment import code_digest, versions
from benchmarks.runs.files import digest_text
from benchmarks.runs.folders import environment, open_run, write_environment
from benchmarks.runs.processes import refuse_several, this_process
from benchmarks.runs.resume import AnyCell, AnyRecord, Rows
from benchmarks.wording import file_name

Report = Callable[[Path, dict[str, Any]], tuple[str, dict[str, bool]]]
"""Makes the tables and the files of a run from its folder and settings: the text, and which files there are."""


def _refuse_none_left(n_calib: int, dataset: Dataset) -> None:
    if dataset.fresh(n_calib) < 1:
        raise BenchmarkError(
            f"--n-calib {n_calib} leaves none of the {len(dataset.train_images):,} training images to draw"
        )


def load_sources(args: argparse.Namespace, most: int | None = None) -> list[Source]:
    """Files of logits, then networks that are quantized here, with up to `most` fresh images to draw from each.

    Raises:
        BenchmarkError: files that cannot be used, no training image left to draw, two sources of one name, or several
            processes.
    """
    refuse_several("a command that fits many corrections", this_process())
    sources = file_sources(args.logits, args.skip)
    if args.dataset is not None:
        loaded = load_network(args, partial(_refuse_none_left, args.n_calib))
        dataset = loaded.dataset
        rest = dataset.fresh(args.n_calib)
        protocol = Protocol(
            iters=args.iters,
            n_calib=args.n_calib,
            n_cat=rest if most is None else min(rest, most),
            batch_size=args.batch_size,
            device=args.device,
        )
        grid = settings_grid(args.methods, args.bits, args.seeds)
        kept = {"cache": loaded.cache, "cache_device": args.cache_device, "progress": not args.no_progress}
        sources += network_sources(grid, protocol, dataset, args.model, loaded.model, **kept)
    twice = sorted(name for name, count in Counter(source.name for source in sources).items() if count > 1)
    if twice:
        raise BenchmarkError(f"more than one source is called {twice[0]}; rename the files")
    return sources


def run_fits(
    args: argparse.Namespace, kind: str, sources: Sequence[Source], grid: Sequence[Cell], report: Report, **more: Any
) -> None:
    """Measure `grid` in the folder of a run, then write and print what `report` makes of it.

    `kind` is the name of the command, and `more` are settings of its own.
    """
    settings = {
        "kind": kind,
        "figures_digest": fits_digest(),
        "versions": versions(),
        "sources": {source.name: source.digest for source in sources},
        "grid": [cell.name for cell in grid],
        **more,
    }
    named = [] if args.dataset is None else [f"{args.dataset}-{file_name(args.model)}"]
    subject = "-".join([kind, *(folder.resolve().name for folder in args.logits), *named])
    # The grid goes source by source, one of which is in memory at a time.
    load = lru_cache(maxsize=1)(lambda source: source.load())
    networks = lru_cache(maxsize=1)(lambda source: source.networks())
    shared = args.cache / "fits" / fits_digest()
    run_grid(
        args,
        subject,
        settings,
        grid,
        lambda cell: measure(cell, load(cell.source), partial(networks, cell.source)),
        lambda folder: draw_rows(folder, shared),
        report,
        args.seeds,
        args.device,
    )


def run_grid(
    args: argparse.Namespace,
    subject: str,
    settings: dict[str, Any],
    grid: Sequence[AnyCell],
    measure: Callable[[AnyCell], AnyRecord],
    rows_in: Callable[[Path], Rows[AnyRecord]],
    report: Report,
    seeds: Sequence[int],
    device: str = "cpu",
) -> None:
    """Measure what is not finished of `grid` in the folder of a run, then write and print what `report` makes of it.

    `rows_in` gives the stored rows of a run's folder, with those in the cache, where runs of other grids have left
    theirs. `subject` and `settings` are as in `open_run`; `seeds` and `device` are noted with the run.
    """
    folder = open_run(args.results, subject, settings, name=args.run, fresh=args.fresh)
    rows, names = rows_in(folder), [cell.name for cell in grid]
    if args.fresh:
        rows.forget(names)
    print(f"{len(rows.finished(names))} of {len(grid)} rows are finished already", flush=True)
    measured = rows.complete(grid, measure, progress=not args.no_progress)
    about = environment(args.command, seeds, device, sum(record.seconds for record in measured))
    write_environment(folder, about | settings)
    text, written = report(folder, settings)
    print(f"\n{text}\n\nwritten to {folder}: {', '.join(written)}, environment.json")


def draw_rows(folder: Path, shared: Path | None = None) -> Rows[Draw]:
    """The stored fits of a run."""
    return Rows(folder / "rows", Draw, shared)


def fits_digest() -> str:
    """Changes with all code that a fit depends on, besides its logits."""
    return digest_text(code_digest(Draw.__module__), repr(versions()))
