"""Command line: `python -m benchmarks speed` times reconstruction, unit by unit, against plain FP training steps.

And the search for ranges, capturing, a step of the fit of layers, and the selection of the output's correction.
"""

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from baselines.api import RANGE_IMAGES, prepare
from baselines.quantization.specs import QuantSpec
from baselines.recipes import RECIPES
from baselines.reconstruction.cache import Cached, CachePlan
from baselines.reconstruction.engine import unit_runs
from baselines.reconstruction.job import Job, RunSettings
from baselines.reconstruction.recording import recorder_for
from baselines.reconstruction.unit_run import UnitRun
from benchmarks import BenchmarkError
from benchmarks.commands.exit_codes import command_line
from benchmarks.commands.parsers import parse_speed
from benchmarks.datasets.description import Request
from benchmarks.datasets.registry import DATASETS
from benchmarks.measure.leak_guard import LeakGuard, fit_guarded, joined
from benchmarks.networks.layer_fits import fit_of_layers
from benchmarks.networks.models import load_weights
from benchmarks.networks.weights_and_transforms import untrained
from benchmarks.reports.tables import csv_table, markdown_table
from benchmarks.runs.files import write_text
from benchmarks.runs.processes import refuse_several, this_process
from benchmarks.wording import bits_name, file_name
from cat_plugin import CATConfig
from cat_plugin.layers.network import BATCH

EAGER = 20  # steps that are launched kernel by kernel
PASSES = 3
WARM_STEPS = 4
WARM_UP = 0.2  # share of the steps that are not counted; the recipes leave the rounding penalty out as long
TYPICAL_ITERS = 1000
TOTAL = "TOTAL"
WITH_INPUTS = "TOTAL, FP with gradients of inputs"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the CSV file: milliseconds of one reconstruction iteration of a unit, and of one FP step.

    Of the other work: of all of it, and of what of the FP network it is measured by. `eager_ms` is that of an iteration
    whose kernels are launched one by one, where the device records them; else None.
    """

    unit: str
    iter_ms: float
    fp_ms: float
    eager_ms: float | None = None

    @property
    def ratio(self) -> float:
        """How many FP steps, or passes, it costs."""
        return self.iter_ms / self.fp_ms


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Lines of all units, the total last, the same total against FP steps that give gradients of the units' inputs, as
    scales that are learned need them; lines of the other work, the seconds that the search for ranges and all
    capturing passes took, and the most memory in bytes."""

    lines: tuple[Line, ...]
    range_seconds: float
    capture_seconds: float
    with_inputs: Line | None = None
    others: tuple[Line, ...] = ()
    peak_bytes: int = 0

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
    """Time every unit of every stage, then the other work; `job` has been prepared for `steps` iterations, warm-up
    included."""
    lines, with_inputs, capture, mark = [], 0.0, 0.0, time.perf_counter()
    several, learns_scales = len(job.recipe.stages) > 1, any(stage.learns_scales for stage in job.recipe.stages)
    seen: dict[str, int] = {}
    for run in unit_runs(job):
        _synchronize(job.generator.device)
        capture += time.perf_counter() - mark
        seen[run.unit.name] = stage = seen.get(run.unit.name, 0) + 1
        timed = _timed(run, steps, job.settings.batch_size, learns_scales)
        if timed is not None:
            name = f"{run.unit.name} (stage {stage})" if several else run.unit.name
            iter_ms, fp_ms, *fp_with_inputs = timed[0]
            lines.append(Line(unit=name, iter_ms=iter_ms, fp_ms=fp_ms, eager_ms=timed[1]))
            with_inputs += sum(fp_with_inputs)
        mark = time.perf_counter()
    capture += time.perf_counter() - mark
    if not lines:
        raise BenchmarkError("this method has no iterations to time")
    eager = [line.eager_ms for line in lines]
    total = Line(
        unit=TOTAL,
        iter_ms=sum(line.iter_ms for line in lines),
        fp_ms=sum(line.fp_ms for line in lines),
        eager_ms=None if None in eager else sum(eager),
    )
    return Timing(
        lines=(*lines, total),
        range_seconds=job.range_seconds,
        capture_seconds=capture,
        with_inputs=replace(total, unit=WITH_INPUTS, fp_ms=with_inputs) if learns_scales else None,
        others=tuple(_others(job, capture)),
        peak_bytes=_peak_bytes(job.generator.device),
    )


def _timed(
    run: UnitRun, steps: int, batch_size: int, with_inputs: bool
) -> tuple[tuple[float, ...], float | None] | None:
    """Median milliseconds of an iteration, of an FP step and, where asked for, of one with the gradient of the input,
    taken in turns; and of an iteration that is not recorded where the device records. None where nothing is learned."""
    device = next(run.fp_module.parameters()).device
    eager = None
    if recorder_for(device) is not None:
        # They learn, too, which makes no difference to the times of the others.
        plainly = itertools.islice(run.steps(record=False), EAGER)
        times = list(iter(lambda: _milliseconds(lambda: next(plainly, None), device), None))
        eager = statistics.median(times[len(times) // 2 :]) if times else None
    ours, theirs = run.steps(), _fp_steps(run, batch_size, with_inputs)
    taken: list[tuple[float, ...]] = []
    while True:
        mine = _milliseconds(lambda: next(ours, None), device)
        if mine is None:
            break
        taken.append((mine, *(_milliseconds(lambda: next(theirs), device) for _ in range(1 + with_inputs))))
    counted = taken[int(WARM_UP * steps) :]
    return (tuple(map(statistics.median, zip(*counted, strict=True))), eager) if counted else None


@torch.no_grad()
def _others(job: Job, capture: float) -> Iterator[Line]:
    """What is not reconstruction, against FP passes over as many images."""
    device, fp, quantized = job.generator.device, job.folded, job.network
    images = job.inputs.batch(0, len(job.inputs))
    size = job.settings.capture_batch_size

    def passing(model: nn.Module, images: Tensor) -> Tensor:
        return torch.cat([model(part) for part in images.split(size)])

    def milliseconds(work: Callable[[], object]) -> float:
        return statistics.median(_milliseconds(work, device) for _ in range(PASSES))

    passing(fp, images[:size])
    ranged = milliseconds(lambda: passing(fp, images[:RANGE_IMAGES]))
    whole = milliseconds(lambda: passing(fp, images))
    yield Line(unit="search for ranges", iter_ms=1000 * job.range_seconds, fp_ms=ranged)
    yield Line(unit="capturing", iter_ms=1000 * capture, fp_ms=whole)
    yield Line(unit="fit of layers, a step", **_layers_step(quantized, fp, images[:BATCH]))
    q, f = (passing(model, images).float().cpu() for model in (quantized, fp))
    guard = LeakGuard(joined(q[:0], f[:0]))  # nothing is tested here
    selection = _milliseconds(lambda: fit_guarded(q, f, CATConfig(), guard), device)
    yield Line(unit="selection of the output", iter_ms=selection, fp_ms=whole)


@torch.enable_grad()
def _layers_step(quantized: nn.Module, fp: nn.Module, images: Tensor) -> dict[str, float]:
    """Milliseconds of a step of the fit of layers, and of FP forward and backward of the same images."""
    device = images.device
    with fit_of_layers(quantized, fp, images) as step:
        fp = copy.deepcopy(fp).requires_grad_(True)

        def train() -> Tensor:
            fp.zero_grad()
            loss = fp(images).logsumexp(1).sum()
            loss.backward()
            return loss

        times = [(_milliseconds(step, device), _milliseconds(train, device)) for _ in range(2 * PASSES + WARM_STEPS)]
    iter_ms, fp_ms = map(statistics.median, zip(*times[WARM_STEPS:], strict=True))
    return {"iter_ms": iter_ms, "fp_ms": fp_ms}


def _peak_bytes(device: torch.device) -> int:
    """Of the accelerator's allocations, or of the process where there is none; 0 where that is unknown."""
    if device.type != "cpu":
        measured = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return 0 if measured is None else measured(device)
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _fp_steps(run: UnitRun, batch_size: int, with_inputs: bool) -> Iterator[Tensor]:
    """Forward and backward passes of the FP unit, as in training: gradients of all weights and biases; where asked
    for, in every second pass also of the unit's input.

    Nothing else is in it: no loss (the gradient of the output is given), no optimiser, no choice of images. The weights
    lie in memory as they do in the unit's own run.
    """
    unit = copy.deepcopy(run.fp_module).requires_grad_(True)
    batch = run.data.fp_input.batch(0, batch_size)
    with_gradient = batch.detach().requires_grad_(batch.is_floating_point())
    gradient: Tensor | None = None
    for given in itertools.cycle((batch, with_gradient) if with_inputs else (batch,)):
        output = run.unit.arguments.of(unit)(given)
        if run.activation is not None:
            output = run.activation(output)
        if gradient is None:
            gradient = torch.randn_like(output)
        output.backward(gradient)
        yield output
        unit.zero_grad()
        given.grad = None


def _milliseconds(work: Callable[[], object], device: torch.device) -> float | None:
    """How long `work` takes; None where it gives None."""
    started = time.perf_counter()
    done = work()
    _synchronize(device)
    return None if done is None else 1000 * (time.perf_counter() - started)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def _units(timing: Timing) -> tuple[Line, ...]:
    return timing.lines if timing.with_inputs is None else (*timing.lines, timing.with_inputs)


def to_csv(timing: Timing) -> str:
    """`unit,iter_ms,eager_ms,fp_ms,ratio`: units, their totals, and the other work."""
    names = ("iter_ms", "eager_ms", "fp_ms", "ratio")
    lines = [
        [line.unit, *("" if (value := getattr(line, name)) is None else f"{value:.4f}" for name in names)]
        for line in (*_units(timing), *timing.others)
    ]
    return csv_table([["unit", *names], *lines])


def to_table(timing: Timing) -> str:
    """The lines as Markdown tables, and what a run of usual length takes as a sentence."""
    recorded = timing.lines[-1].eager_ms is not None
    header = "unit", "ms / iteration", *(["not recorded"] * recorded), "ms FP forward + backward", "ratio"
    lines = [
        (
            line.unit,
            *(f"{each:.2f}" for each in (line.iter_ms, line.eager_ms, line.fp_ms, line.ratio) if each is not None),
        )
        for line in _units(timing)
    ]
    others = [(line.unit, f"{line.iter_ms:.1f}", f"{line.fp_ms:.1f}", f"{line.ratio:.2f}") for line in timing.others]
    whole = timing.seconds_at(TYPICAL_ITERS)
    parts = [markdown_table([header, *lines], text_columns=1)]
    if others:
        parts.append(markdown_table([("beside it", "ms", "ms FP", "ratio"), *others], text_columns=1))
    parts.append(
        f"A run of {TYPICAL_ITERS:,} iterations a unit: {whole:.0f} s, of which "
        f"{timing.range_seconds:.2f} s ({timing.range_seconds / whole:.1%}) search for ranges and "
        f"{timing.capture_seconds:.2f} s ({timing.capture_seconds / whole:.1%}) capture inputs and outputs. "
        f"Peak memory: {timing.peak_bytes / 2**30:.2f} GiB."
    )
    return "\n\n".join(parts)


def _title(args: argparse.Namespace) -> str:
    return (
        f"Reconstruction of {args.model} by {args.method} at {bits_name(args.w_bits, args.a_bits)}, batches of "
        f"{args.batch_size}, {args.n_calib:,} images, on {args.device} with {args.threads} thread(s); "
        f"medians of {args.steps - int(WARM_UP * args.steps)} iterations."
    )


def _job(args: argparse.Namespace) -> Job:
    device = torch.device(args.device)
    model = untrained(args.model, DATASETS[args.dataset].output_count(Request(data=None, cache=args.cache), None))
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
