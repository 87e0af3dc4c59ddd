"""Command line: ``python -m benchmarks.robustness`` fits corrections on many small draws and shows how they spread."""

import argparse
import inspect
import sys
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import product

from benchmarks import BenchmarkError, draws, evaluate
from benchmarks.command import environment, exit_code, load_network
from benchmarks.draws import Cell, Gain, Source, cells, measure
from benchmarks.environment import source_digest, versions
from benchmarks.evaluate import PairedLogits, Protocol, Setting
from benchmarks.files import digest_text
from benchmarks.options import parse_robustness
from benchmarks.report import write_environment
from benchmarks.robustness_report import shortfalls, to_markdown, write_report
from benchmarks.runs import Rows, open_run
from benchmarks.sources import file_sources, network_sources


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 2 for input that the user can put right, 130 for an interruption."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return exit_code(lambda: _measure_grid(parse_robustness(argv), argv), resumes=True)


def _measure_grid(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure every source, number of images, draw and mode, then write and print the tables."""
    sources = _sources(args)
    notes = shortfalls(sources, args.images, args.max_draws)
    grid = cells(sources, args.images, args.max_draws)
    if not grid:
        raise BenchmarkError(f"not one draw of {min(args.images):,} images fits; {' '.join(notes)}")
    settings = {
        "figures_digest": _figures_digest(),
        "versions": versions(),
        "sources": {source.name: source.digest for source in sources},
        "images": args.images,
        "max_draws": args.max_draws,
    }
    folder = open_run(args.results, _subject(args), settings, name=args.run, fresh=args.fresh)
    # Beside the other caches, where a run of more draws or sources finds them, too.
    rows = Rows(args.cache / "robustness" / settings["figures_digest"], Gain)
    if args.fresh:
        rows.forget(grid)
    print("\n".join([*notes, f"{len(rows.finished(grid))} of {len(grid)} rows are finished already"]), flush=True)

    # The grid goes source by source, so one at a time is in memory.
    @lru_cache(maxsize=1)
    def logits(source: Source) -> PairedLogits:
        return source.load()

    def work(cell: Cell) -> Gain:
        return measure(cell, logits(cell.source))

    gains = rows.complete(grid, work, progress=not args.no_progress)
    written = write_report(folder, gains, notes)
    seconds = sum(gain.fit_seconds for gain in gains)
    write_environment(folder, environment("benchmarks.robustness", argv, args.seeds, seconds) | settings)
    print(f"\n{to_markdown(gains, notes)}\n\nwritten to {folder}: {', '.join(written)}, environment.json")


def _sources(args: argparse.Namespace) -> list[Source]:
    """Files of logits, then networks that are quantized here."""
    sources = file_sources(args.logits, args.skip)
    if args.dataset is not None:
        dataset, model = load_network(args)
        rest = len(dataset.train_images) - args.n_calib
        if rest < 1:
            raise BenchmarkError(
                f"--n-calib {args.n_calib} leaves none of the {len(dataset.train_images):,} training images to draw"
            )
        protocol = Protocol(
            iters=args.iters, n_calib=args.n_calib, n_cat=rest, batch_size=args.batch_size, device=args.device
        )
        grid = [Setting(method, *bits, seed) for method, bits, seed in product(args.methods, args.bits, args.seeds)]
        kept = {"cache": args.cache, "cache_device": args.cache_device}
        sources += network_sources(grid, protocol, dataset, args.model, model, **kept, progress=not args.no_progress)
    twice = sorted(name for name, count in Counter(source.name for source in sources).items() if count > 1)
    if twice:
        raise BenchmarkError(f"more than one source is called {twice[0]}; rename the files")
    return sources


def _subject(args: argparse.Namespace) -> str:
    networks = [] if args.dataset is None else [f"{args.dataset}-{args.model}"]
    return "-".join(["robustness", *(folder.resolve().name for folder in args.logits), *networks])


def _figures_digest() -> str:
    """Changes with all code that a row depends on, besides its logits."""
    return digest_text(
        source_digest("cat_plugin"), inspect.getsource(draws), inspect.getsource(evaluate), repr(versions())
    )


if __name__ == "__main__":
    sys.exit(main())
