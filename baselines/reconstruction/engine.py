"""The reconstruction engine: walks through the units and makes each quantized one reproduce its FP twin."""

from collections.abc import Iterable, Iterator

from torch import nn
from tqdm.auto import tqdm

from baselines.quantization.layers import quantized_layers
from baselines.quantization.quantizers import ActivationQuantizer, bypassed
from baselines.recipes import Stage
from baselines.reconstruction.job import Job
from baselines.reconstruction.rest_of_network import RestOfNetwork, predictions
from baselines.reconstruction.streams import Stream
from baselines.reconstruction.unit_run import UnitData, UnitRun


def reconstruct(job: Job, *, progress: bool = False) -> None:
    """Reconstruct the quantized network of `job` unit by unit, in place, then harden all weights.

    Raises:
        FloatingPointError: the loss of a unit became NaN or infinite; says which unit and which step.
    """
    iters = [_steps(job, stage) for stage in job.recipe.stages]
    done = sum(steps * _finished(job, stage) for stage, steps in enumerate(iters))
    with tqdm(total=len(job.units) * sum(iters), initial=done, unit="step", disable=not progress, leave=False) as bar:
        for run in unit_runs(job):
            bar.set_description(run.unit.name)
            run.finish(bar)


def unit_runs(job: Job) -> Iterator[UnitRun]:
    """The work of `reconstruct`, one unit of one stage at a time.

    Whoever iterates has to take all steps of a run (`UnitRun.steps`, or `UnitRun.finish`) before asking
    for the next one; the run's data are gone by then.
    """
    layers_in_units = {name for unit in job.units for name in unit.layers}
    _harden(job.network, quantized_layers(job.network).keys() - layers_in_units)
    quantizers = [module for module in job.network.modules() if isinstance(module, ActivationQuantizer)]
    for number, stage in enumerate(job.recipe.stages):
        if not stage.rounding:
            _harden(job.network, layers_in_units)
        if _steps(job, stage) > 0:
            with bypassed(quantizers, not stage.quantize_activations):
                yield from _walk(job, number)
    _harden(job.network, quantized_layers(job.network))


def _steps(job: Job, stage: Stage) -> int:
    """Optimiser steps a unit in `stage`: none where no unit has anything to learn in it."""
    layers = (job.network.get_submodule(name) for unit in job.units for name in unit.layers)
    modules = (module for unit in job.units for module in job.network.get_submodule(unit.name).modules())
    rounding = stage.rounding and any(layer.weight_quantizer is not None for layer in layers)
    scales = stage.learns_scales and any(isinstance(module, ActivationQuantizer) for module in modules)
    return job.settings.iters_of(stage) if rounding or scales else 0


def _harden(network: nn.Module, names: Iterable[str]) -> None:
    """Round the weights of these layers to nearest; those that are on the grid already stay where they are."""
    for name in names:
        network.get_submodule(name).harden()


def _finished(job: Job, stage: int) -> int:
    """How many units of the stage the checkpoint holds."""
    return 0 if job.checkpoint is None else min(job.checkpoint.finished(stage), len(job.units))


def _walk(job: Job, number: int) -> Iterator[UnitRun]:
    """One stage: both streams come to each unit, it is reconstructed, and they pass on.

    Units from the checkpoint are passed as they were when they were finished, so that the streams bring to the next
    one what they brought in the run that was stopped.
    """
    stage, finished = job.recipe.stages[number], _finished(job, number)
    if finished == len(job.units):
        for index, unit in enumerate(job.units):
            job.checkpoint.restore(number, index, job.network.get_submodule(unit.name), job.generator)
        return
    size = job.settings.capture_batch_size
    fp_stream, stream = (Stream(model, job.inputs, size) for model in (job.folded, job.network))
    prediction = predictions(job.folded, job.inputs, size) if job.recipe.looks_ahead else None
    rest, passed = None, []
    for index, unit in enumerate(job.units):
        module = job.network.get_submodule(unit.name)
        fp_input, q_input = fp_stream.arrive(unit), stream.arrive(unit)
        target = fp_stream.leave(unit, fp_input)
        shape = target.tensor.shape[1:]
        if index < finished:
            job.checkpoint.restore(number, index, module, job.generator)
        else:
            corrected = fp_input if job.corrector is None else job.corrector.correct(unit.name, fp_input, size)
            if corrected is not fp_input:
                fp_input = corrected
                target = fp_input.mapped(unit.arguments.of(job.folded.get_submodule(unit.name)), size)
            del corrected
            if unit.activation:
                target = target.mapped(job.folded.get_submodule(unit.activation), size)
            if prediction is not None:
                rest = RestOfNetwork(job.folded, job.inputs, unit, list(passed))
                rest.check(target)
            given = fp_input if stage.fp_inputs else q_input
            run = UnitRun(job, stage, unit, UnitData(fp_input, given, target, prediction, rest))
            fp_input = target = given = None  # what is needed, the run holds
            if job.recipe.error_weighting == "fisher":
                run.weigh(size)
            yield run
            run.data = None  # frees it although whoever iterates still holds the run
            _harden(job.network, unit.layers)
            if job.checkpoint is not None:
                job.checkpoint.save(number, index, module, job.generator)
        passed.append((unit.name, shape))
        del fp_input, target
        stream.leave(unit, q_input)
        del q_input
