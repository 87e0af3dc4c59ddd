"""Command line: `python -m benchmarks speed` times reconstruction, unit by unit, against plain FP training steps."""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.api import prepare
from baselines.quantization.specs import QuantSpec
from baselines.recipes import RECIPES
from baselines.reconstruction.cache import Cached, CachePlan
from baselines.reconstruction.engine import unit_runs
from baselines.reconstruction.job import Job, RunSettings
from baselines.reconstruction.unit_run import UnitRun
from benchmarks import BenchmarkError
from benchmarks.commands.exit_codes import command_line
from benchmarks.commands.parsers import parse_speed
from benchmarks.datasets.description import Request
from benchmarks.datasets.registry import DATASETS
from benchmarks.networks.models import load_weights
from benchmarks.networks.weights_and_transforms import untrained
from benchmarks.reports.tables import csv_table, markdown_table
from benchmarks.runs.files import write_text
from benchmarks.runs.processes import refuse_several, this_process
from benchmarks.wording import bits_name, file_name

WARM_UP = 0.2  # share of the steps that are not counted; the recipes leave the rounding penalty out as long
TYPICAL_ITERS = 1000
TOTAL = "TOTAL"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the CSV file: milliseconds of one reconstruction iteration of a unit, and of one FP step."""

    unit: str
    iter_ms: float
    fp_fwd_bwd_ms: float

    @property
    def ratio(self) -> float:
        """How many FP steps an iteration costs."""
        return self.iter_ms / self.fp_fwd_bwd_ms


@dataclass(frozen=True, kw_only=True)
class Timing:
    """All lines, the total last, and the seconds that the search for ranges and all capturing passes took."""

    lines: tuple[Line, ...]
    range_seconds: float
    capture_seconds: float

    def seconds_at(self, iters: int) -> float:
        """The whole run with `iters` iterations a unit."""
        return self.range_seconds + self.capture_seconds + self.lines[-1].iter_ms * iters / 1000


def _time(args: argparse.Namespace) -> None:
    """Time every unit, then write and print the table."""
    refuse_several("speed", this_process())
    torch.set_num_threads(args.threads)
    timing = measure(_job(args), args.steps)
    path = (
        args.results
        / "speed"
        / f"{args.dataset}-{file_name(args.model)}-{args.method}-w{args.w_bits}a{args.a_bits}.csv"
    )
    write_text(path, to_csv(timing))
    print(f"{_title(args)}\n\n{to_table(timing)}\n\nwritten to {path}")


main = command_line("speed", parse_speed, _time, resumes=False)


def measure(job: Job, steps: int) -> Timing:
    """Time every unit of every stage; `job` has been prepared for `steps` iterations, warm-up included."""
    lines, capture, mark = [], 0.0, time.perf_counter()
    several = len(job.recipe.stages) > 1
    seen: dict[str, int] = {}
    for run in unit_runs(job):
        _synchronize(job.generator.device)
        capture += time.perf_counter() - mark
        seen[run.unit.name] = stage = seen.get(run.unit.name, 0) + 1
        timed = _timed(run, steps, job.settings.batch_size)
        if timed is not None:
            name = f"{run.unit.name} (stage {stage})" if several else run.unit.name
            lines.append(Line(unit=name, iter_ms=timed[0], fp_fwd_bwd_ms=timed[1]))
        mark = time.perf_counter()
    capture += time.perf_counter() - mark
    if not lines:
        raise BenchmarkError("this method has no iterations to time")
    total = Line(
        unit=TOTAL,
        iter_ms=sum(line.iter_ms for line in lines),
        fp_fwd_bwd_ms=sum(line.fp_fwd_bwd_ms for line in lines),
    )
    return Timing(lines=(*lines, total), range_seconds=job.range_seconds, capture_seconds=capture)


def _timed(run: UnitRun, steps: int, batch_size: int) -> tuple[float, float] | None:
    """Median milliseconds of an iteration and of an FP step, taken in turns; None where nothing is learned."""
    ours, theirs = run.steps(), _fp_steps(run, batch_size)
    device = next(run.fp_module.parameters()).device
    times: list[tuple[float, float]] = []
    while True:
        mine = _milliseconds(lambda: next(ours, None), device)
        if mine is None:
            break
        times.append((mine, _milliseconds(lambda: next(theirs), device)))
    counted = times[int(WARM_UP * steps) :]
    return tuple(map(statistics.median, zip(*counted, strict=True))) if counted else None


def _fp_steps(run: UnitRun, batch_size: int) -> Iterator[Tensor]:
    """Forward and backward passes of the FP unit, as in training: gradients of all weights and biases.

    Nothing else is in it: no loss (the gradient of the output is given), no optimiser, no choice of images, and no
    gradient of the unit's input. The weights lie in memory as they do in the unit's own run.
    """
    unit = copy.deepcopy(run.fp_module).requires_grad_(True)
    batch = run.data.fp_input.batch(0, batch_size)
    gradient: Tensor | None = None
    while True:
        output = unit(batch)
        if run.activation is not None:
            output = run.activation(output)
        if gradient is None:
            gradient = torch.randn_like(output)
        output.backward(gradient)
        yield output
        unit.zero_grad()


def _milliseconds(work: Callable[[], object], device: torch.device) -> float | None:
    """How long `work` takes; None where it gives None."""
    started = time.perf_counter()
    done = work()
    _synchronize(device)
    return None if done is None else 1000 * (time.perf_counter() - started)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def to_csv(timing: Timing) -> str:
    """`unit,iter_ms,fp_fwd_bwd_ms,ratio`, the total last."""
    names = ("iter_ms", "fp_fwd_bwd_ms", "ratio")
    lines = [[line.unit, *(f"{getattr(line, name):.4f}" for name in names)] for line in timing.lines]
    return csv_table([["unit", *names], *lines])


def to_table(timing: Timing) -> str:
    """The lines as a Markdown table, and what a run of usual length takes as a sentence."""
    header = "unit", "ms / iteration", "ms FP forward + backward", "ratio"
    lines = [
        (line.unit, *(f"{each:.2f}" for each in (line.iter_ms, line.fp_fwd_bwd_ms, line.ratio)))
        for line in timing.lines
    ]
    whole = timing.seconds_at(TYPICAL_ITERS)
    return (
        f"{markdown_table([header, *lines], text_columns=1)}\n\n"
        f"A run of {TYPICAL_ITERS:,} iterations a unit: {whole:.0f} s, of which "
        f"{timing.range_seconds:.2f} s ({timing.range_seconds / whole:.1%}) search for ranges and "
        f"{timing.capture_seconds:.2f} s ({timing.capture_seconds / whole:.1%}) capture inputs and outputs."
    )


def _title(args: argparse.Namespace) -> str:
    return (
        f"Reconstruction of {args.model} by {args.method} at {bits_name(args.w_bits, args.a_bits)}, batches of "
        f"{args.batch_size}, {args.n_calib:,} images, on {args.device} with {args.threads} thread(s); "
        f"medians of {args.steps - int(WARM_UP * args.steps)} iterations."
    )


def _job(args: argparse.Namespace) -> Job:
    device = torch.device(args.device)
    model = untrained(args.model, DATASETS[args.dataset].output_counts(Request(data=None, cache=args.cache))[0])
    if args.weights is not None:
        load_weights(model, args.weights)
    plan = CachePlan(device if args.cache_device == "model" else torch.device("cpu"), None, device)
    images = _images(args)[: args.n_calib].to(plan.device, memory_format=torch.channels_last)
    settings = RunSettings(iters=args.steps, batch_size=args.batch_size, capture_batch_size=max(64, args.batch_size))
    spec = QuantSpec(w_bits=args.w_bits, a_bits=args.a_bits)
    return prepare(model.to(device), Cached(images, plan), RECIPES[args.method], spec, settings, seed=0)


def _images(args: argparse.Namespace) -> Tensor:
    """Real ones where they are at hand, else random ones: it makes no difference to the time."""
    description = DATASETS[args.dataset]
    if args.data is not None or description.bundled_with is not None:
        request = Request(data=args.data, cache=args.cache, progress=not args.no_progress)
        return description.load(request).train_images
    return torch.randn(args.n_calib, *description.image_shape, generator=torch.Generator().manual_seed(0))
