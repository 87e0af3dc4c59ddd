"""Command line: ``python -m benchmarks`` measures what quantization loses and what CAT brings back."""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import product
from typing import Any

from torch import nn

from baselines.files import digest_tensors
from benchmarks import BenchmarkError
from benchmarks.data import Dataset, load_cifar10, load_digits
from benchmarks.environment import describe_machine, source_digest, versions
from benchmarks.evaluate import Measurement, Protocol, Setting, measure
from benchmarks.models import check_outputs, create_model, load_weights
from benchmarks.options import parse
from benchmarks.report import to_markdown, write_environment, write_report
from benchmarks.runs import Run
from benchmarks.training import trained_model
from cat_plugin import CATError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 2 for input that the user can put right, 130 for an interruption."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        _measure_grid(parse(argv), argv)
    except (BenchmarkError, CATError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    return 0


def _measure_grid(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measure every method, bit setting and seed, then write and print the table."""
    progress = not args.no_progress
    dataset = load_digits() if args.dataset == "digits" else load_cifar10(args.data, args.cache, progress=progress)
    model = _load_model(args, dataset).to(args.device)
    protocol = Protocol(
        iters=args.iters, n_calib=args.n_calib, n_cat=args.n_cat, batch_size=args.batch_size, device=args.device
    )
    grid = [Setting(method, *bits, seed) for method, bits, seed in product(args.methods, args.bits, args.seeds)]
    settings = _settings(dataset, args.model, model, protocol, grid)
    run = Run.open(args.results, settings, name=args.run, fresh=args.fresh)
    if done := len(run.finished()):
        print(f"resuming {run.folder}: {done} of {len(grid)} rows are finished already")

    def work(setting: Setting) -> Measurement:
        return measure(setting, protocol, dataset, args.model, model, cache=args.cache, progress=progress)

    measured = run.complete(grid, work, progress=progress)
    write_report(run.folder, measured)
    seconds = sum(measurement.seconds for measurement in measured)
    write_environment(run.folder, _environment(argv, args.seeds, seconds) | settings)
    print(f"\n{to_markdown(measured)}\n\nwritten to {run.folder}: results.csv, .json, .md, environment.json")


def _load_model(args: argparse.Namespace, dataset: Dataset) -> nn.Module:
    if args.weights is None:
        return trained_model(args.model, dataset, args.cache, progress=not args.no_progress)
    model = create_model(args.model, len(dataset.classes))
    load_weights(model, args.weights)
    check_outputs(model, dataset.test_images, dataset.classes)
    return model


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


def _environment(argv: Sequence[str], seeds: Sequence[int], seconds: float) -> dict[str, Any]:
    """What is worth knowing about a run, besides its settings; ``seconds`` is what all its rows took to measure."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks", *argv]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "seeds": list(seeds),
        **describe_machine(),
    }


if __name__ == "__main__":
    sys.exit(main())
