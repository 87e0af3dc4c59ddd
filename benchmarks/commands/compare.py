"""Command line: `python -m benchmarks compare` measures what quantization loses and what CAT brings back."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from baselines.files import digest_tensors
from benchmarks import BenchmarkError
from benchmarks.commands.exit_codes import command_line
from benchmarks.commands.loading import Loaded, load_network
from benchmarks.commands.option_checks import refuse_too_few
from benchmarks.commands.parsers import parse_compare
from benchmarks.datasets.dataset import Dataset
from benchmarks.datasets.registry import DATASETS
from benchmarks.measure.accuracy import Measurement, measure
from benchmarks.measure.protocol import Protocol, Setting, settings_grid
from benchmarks.reports import cost_report
from benchmarks.reports.comparison_plots import plot_comparison
from benchmarks.reports.comparison_report import to_markdown, write_report
from benchmarks.runs.environment import code_digest, versions
from benchmarks.runs.folders import environment, open_run, write_environment
from benchmarks.runs.processes import Process, this_process
from benchmarks.runs.resume import Rows
from benchmarks.wording import file_name

NAME = "compare"


def _measure_grid(args: argparse.Namespace) -> None:
    """Measure every method, bit setting and seed, then write and print the table; several processes share the work."""
    process = this_process()
    _refuse_fresh(args, process)
    progress = not args.no_progress and process.first
    loaded = load_network(args, partial(_count_images, args))
    dataset, model = loaded.dataset, loaded.model
    protocol = Protocol(
        iters=args.iters, n_calib=args.n_calib, n_cat=args.n_cat, batch_size=args.batch_size, device=args.device
    )
    grid = settings_grid(args.methods, args.bits, args.seeds)
    settings = _settings(loaded, args.model, protocol, args.modes, grid)
    folder = open_run(
        args.results, f"{dataset.name}-{file_name(args.model)}", settings, name=args.run, fresh=args.fresh
    )
    rows = rows_of(folder)
    if process.first and (done := len(rows.finished([setting.name for setting in grid]))):
        again = "; --fresh measures them again" if done == len(grid) else ""
        print(f"resuming {folder}: {done} of {len(grid)} rows are finished already{again}")

    def work(setting: Setting) -> Measurement:
        kept = {"cache": loaded.cache, "cache_device": args.cache_device}
        return measure(setting, protocol, dataset, args.model, model, args.modes, **kept, progress=progress)

    measured = rows.complete_together(grid, work, process, progress=progress)
    if measured is None:
        return
    weights = weights_of(settings)
    written = write_report(folder, measured, weights) | plot_comparison(folder, measured, dataset.classes)
    about = environment(args.command, args.seeds, args.device, sum(each.seconds for each in measured))
    write_environment(folder, about | {"fp_check": loaded.fp_check} | settings)
    text = "\n\n".join(filter(None, [to_markdown(measured, weights), cost_report.to_markdown(measured)]))
    print(f"\n{text}\n\nwritten to {folder}: {', '.join(written)}, environment.json")
    if (package := DATASETS[dataset.name].bundled_with) is not None:
        print(
            f"\nThis checks that everything runs; it is no result: {dataset.name}, which come with {package}, are too "
            "easy. Real networks: compare --dataset cifar10 or imagenet."
        )


main = command_line(NAME, parse_compare, _measure_grid, resumes=True)


def _count_images(args: argparse.Namespace, dataset: Dataset) -> None:
    """Complete `--n-cat`, and raise `BenchmarkError` where there are too few images."""
    if args.n_cat is None:
        args.n_cat = len(dataset.test_images) // dataset.test_folds
        refuse_too_few(args)
    dataset.split(args.n_calib, args.n_cat, seed=0)


def _refuse_fresh(args: argparse.Namespace, process: Process) -> None:
    # The other processes could not tell whether what they find was there before the first one has emptied the folder.
    if args.fresh and not process.alone:
        raise BenchmarkError(f"--fresh is for one process, got WORLD_SIZE={process.world}; delete the folder instead")


def rows_of(folder: Path) -> Rows[Measurement]:
    """The stored rows of a run."""
    return Rows(folder / "rows", Measurement)


def weights_of(settings: dict[str, Any]) -> str | None:
    """What tables call the full-precision weights of a run, or None where there are no others for its network."""
    description = DATASETS.get(settings.get("dataset"))
    return settings.get("weights") if description is not None and description.published else None


def _settings(
    loaded: Loaded, model_name: str, protocol: Protocol, modes: Sequence[str], grid: Sequence[Setting]
) -> dict[str, Any]:
    """All that the figures depend on: a run resumes only where nothing of this has changed."""
    dataset = loaded.dataset
    return {
        "kind": NAME,
        "dataset": dataset.name,
        "model": model_name,
        "classes": list(dataset.classes),
        "data_digest": dataset.digest(),
        "weights_digest": digest_tensors(loaded.model.state_dict()),
        "weights": loaded.weights,
        "network_digest": loaded.digest,
        "code_digest": code_digest(Measurement.__module__, Loaded.__module__),
        "versions": versions(),
        "protocol": asdict(protocol),
        "test_folds": dataset.test_folds,
        "modes": list(modes),
        "grid": [setting.name for setting in grid],
    }
