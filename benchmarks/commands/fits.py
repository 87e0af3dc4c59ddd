"""What the commands that fit many corrections share: where logits come from, and where finished fits are kept."""

import argparse
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.commands.command import load_network, settings_grid
from benchmarks.measure.draws import Cell, Draw, Source, measure
from benchmarks.measure.evaluate import Protocol
from benchmarks.measure.sources import file_sources, network_sources
from benchmarks.runs.environment import code_digest, versions
from benchmarks.runs.files import digest_text
from benchmarks.runs.processes import refuse_several, this_process
from benchmarks.runs.runs import Rows


def load_sources(args: argparse.Namespace, most: int | None = None) -> list[Source]:
    """Files of logits, then networks that are quantized here, with up to ``most`` fresh images to draw from each.

    Raises:
        BenchmarkError: files that cannot be used, no training image left to draw, two sources of one name, or several
            processes.
    """
    refuse_several("a command that fits many corrections", this_process())
    sources = file_sources(args.logits, args.skip)
    if args.dataset is not None:
        loaded = load_network(args)
        dataset = loaded.dataset
        rest = len(dataset.train_images) - args.n_calib
        if rest < 1:
            raise BenchmarkError(
                f"--n-calib {args.n_calib} leaves none of the {len(dataset.train_images):,} training images to draw"
            )
        protocol = Protocol(
            iters=args.iters,
            n_calib=args.n_calib,
            n_cat=rest if most is None else min(rest, most),
            batch_size=args.batch_size,
            device=args.device,
            features=args.features,
        )
        kept = {"cache": args.cache, "cache_device": args.cache_device, "progress": not args.no_progress}
        sources += network_sources(settings_grid(args), protocol, dataset, args.model, loaded.model, **kept)
    twice = sorted(name for name, count in Counter(source.name for source in sources).items() if count > 1)
    if twice:
        raise BenchmarkError(f"more than one source is called {twice[0]}; rename the files")
    return sources


def fit_draws(args: argparse.Namespace, folder: Path, grid: Sequence[Cell]) -> list[Draw]:
    """The fits of ``grid`` in the run ``folder``, source by source, one of which is in memory at a time.

    Finished ones are taken from the folder, or from the cache, where runs of other grids have left theirs.
    """
    rows = draw_rows(folder, args.cache / "fits" / fits_digest())
    names = [cell.name for cell in grid]
    if args.fresh:
        rows.forget(names)
    print(f"{len(rows.finished(names))} of {len(grid)} rows are finished already", flush=True)
    load = lru_cache(maxsize=1)(lambda source: source.load())
    return rows.complete(grid, lambda cell: measure(cell, load(cell.source)), progress=not args.no_progress)


def draw_rows(folder: Path, shared: Path | None = None) -> Rows[Draw]:
    """The stored fits of a run."""
    return Rows(folder / "rows", Draw, shared)


def fit_settings(kind: str, sources: Sequence[Source], grid: Sequence[Cell], **more: Any) -> dict[str, Any]:
    """All that the figures of fits depend on."""
    return {
        "kind": kind,
        "figures_digest": fits_digest(),
        "versions": versions(),
        "sources": {source.name: source.digest for source in sources},
        "grid": [cell.name for cell in grid],
        **more,
    }


def subject(args: argparse.Namespace, command: str) -> str:
    """What names of run folders start with."""
    networks = [] if args.dataset is None else [f"{args.dataset}-{args.model}"]
    return "-".join([command, *(folder.resolve().name for folder in args.logits), *networks])


def fits_digest() -> str:
    """Changes with all code that a fit depends on, besides its logits."""
    return digest_text(code_digest("benchmarks.measure.draws"), repr(versions()))
