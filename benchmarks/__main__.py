"""Command line: ``python -m benchmarks`` measures what quantization loses and what CAT brings back."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

from torch import nn

from baselines.files import digest_tensors
from benchmarks.command import environment, exit_code, load_network
from benchmarks.data import Dataset
from benchmarks.environment import source_digest, versions
from benchmarks.evaluate import Measurement, Protocol, Setting, measure
from benchmarks.options import parse
from benchmarks.report import to_markdown, write_environment, write_report
from benchmarks.runs import Rows, open_run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 2 for input that the user can put right, 130 for an interruption."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return exit_code(lambda: _measure_grid(parse(argv), argv), resumes=True)


def _measure_grid(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure every method, bit setting and seed, then write and print the table."""
    progress = not args.no_progress
    dataset, model = load_network(args)
    protocol = Protocol(
        iters=args.iters, n_calib=args.n_calib, n_cat=args.n_cat, batch_size=args.batch_size, device=args.device
    )
    grid = [Setting(method, *bits, seed) for method, bits, seed in product(args.methods, args.bits, args.seeds)]
    settings = _settings(dataset, args.model, model, protocol, grid)
    folder = open_run(args.results, f"{dataset.name}-{args.model}", settings, name=args.run, fresh=args.fresh)
    rows = Rows(folder / "rows", Measurement)
    if done := len(rows.finished(grid)):
        print(f"resuming {folder}: {done} of {len(grid)} rows are finished already")

    def work(setting: Setting) -> Measurement:
        kept = {"cache": args.cache, "cache_device": args.cache_device}
        return measure(setting, protocol, dataset, args.model, model, **kept, progress=progress)

    measured = rows.complete(grid, work, progress=progress)
    write_report(folder, measured)
    seconds = sum(measurement.seconds for measurement in measured)
    write_environment(folder, environment("benchmarks", argv, args.seeds, seconds) | settings)
    print(f"\n{to_markdown(measured)}\n\nwritten to {folder}: results.csv, .json, .md, environment.json")


def _settings(
    dataset: Dataset, model_name: str, model: nn.Module, protocol: Protocol, grid: Sequence[Setting]
) -> dict[str, Any]:
    """All that the figures depend on: a run resumes only where nothing of this has changed."""
    return {
        "dataset": dataset.name,
        "model": model_name,
        "data_digest": dataset.digest(),
        "weights_digest": digest_tensors(model.state_dict()),
        "source_digest": source_digest(),
        "versions": versions(),
        "protocol": asdict(protocol),
        "grid": [setting.name for setting in grid],
    }


if __name__ == "__main__":
    sys.exit(main())
