"""The reconstruction engine: walks through the units and makes each quantized one reproduce its FP twin."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from baselines.network.units import Unit, quantized_layers
from baselines.quantization.quantizers import ActivationQuantizer, Rounding, coin_flips
from baselines.recipes import Recipe, Stage
from baselines.reconstruction.cache import Cached, Stream
from baselines.reconstruction.checkpoint import Checkpoint
from baselines.reconstruction.distribution import Corrector
from baselines.reconstruction.losses import annealed_beta, prediction_difference, reconstruction_error
from baselines.reconstruction.rest_of_network import RestOfNetwork, fisher_weights, predictions

logger = logging.getLogger(__name__)

_CHECK_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run may choose beside the recipe: steps a unit and stage (None: as published), images a step, images a
    capturing pass."""

    iters: int | None
    batch_size: int
    capture_batch_size: int

    def iters_of(self, stage: Stage) -> int:
        """Steps a unit in ``stage``."""
        return stage.iters if self.iters is None else self.iters


@dataclass(frozen=True)
class UnitData:
    """Calibration data of one unit: its inputs in both networks and the FP output behind the activation; where
    predictions are compared, those of the FP network ``(N, C, ...)`` and what makes them of the unit's outputs;
    where errors are weighted, their weights."""

    fp_input: Cached
    input: Cached
    target: Cached
    prediction: Tensor | None = None
    rest: RestOfNetwork | None = None
    weights: Cached | None = None


@dataclass(frozen=True)
class Job:
    """A network to reconstruct.

    Attributes:
        folded: the FP twin; same module names as ``network``.
        network: the quantized network, with ranges set.
        units: in calling order.
        inputs: calibration inputs ``(N, ...)``.
        generator: of everything random; on the device of the networks.
        range_seconds: what the search for ranges has taken.
        corrector: of the units' FP inputs, if the recipe corrects them.
        checkpoint: where finished units are kept, and taken from.
    """

    folded: nn.Module
    network: nn.Module
    units: list[Unit]
    inputs: Cached
    recipe: Recipe
    settings: RunSettings
    generator: torch.Generator
    range_seconds: float
    corrector: Corrector | None = None
    checkpoint: Checkpoint | None = None


def reconstruct(job: Job, *, progress: bool = False) -> None:
    """Reconstruct the quantized network of ``job`` unit by unit, in place, then harden all weights.

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
    """The work of :func:`reconstruct`, one unit of one stage at a time.

    Whoever iterates has to take all steps of a run (:meth:`UnitRun.steps`, or :meth:`UnitRun.finish`) before asking
    for the next one; the run's data are gone by then.
    """
    layers_in_units = {name for unit in job.units for name in unit.layers}
    _harden(job.network, quantized_layers(job.network).keys() - layers_in_units)
    for number, stage in enumerate(job.recipe.stages):
        if not stage.rounding:
            _harden(job.network, layers_in_units)
        if _steps(job, stage) > 0:
            with _activations_bypassed(job.network, not stage.quantize_activations):
                yield from _walk(job, number)
    _harden(job.network, quantized_layers(job.network))


def _steps(job: Job, stage: Stage) -> int:
    """Optimiser steps a unit in ``stage``: none where no unit has anything to learn in it."""
    layers = (job.network.get_submodule(name) for unit in job.units for name in unit.layers)
    modules = (module for unit in job.units for module in job.network.get_submodule(unit.name).modules())
    rounding = stage.rounding and any(layer.weight_quantizer is not None for layer in layers)
    scales = stage.learns_scales and any(isinstance(module, ActivationQuantizer) for module in modules)
    return job.settings.iters_of(stage) if rounding or scales else 0


def _harden(network: nn.Module, names: Iterable[str]) -> None:
    """Round the weights of these layers to nearest; those that are on the grid already stay where they are."""
    for name in names:
        network.get_submodule(name).harden()


@contextlib.contextmanager
def _activations_bypassed(network: nn.Module, bypass: bool) -> Iterator[None]:
    quantizers = [module for module in network.modules() if isinstance(module, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.bypass = bypass
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.bypass = False


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
                target = fp_input.mapped(job.folded.get_submodule(unit.name), size)
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


class UnitRun:
    """One stage on one unit.

    Attributes:
        unit: which one.
        module, fp_module: the unit in the quantized network and in the FP twin.
        activation: what the outputs are compared behind, if anything.
        data: its calibration data.
    """

    data: UnitData | None

    def __init__(self, job: Job, stage: Stage, unit: Unit, data: UnitData) -> None:
        self.unit, self.data = unit, data
        self.module, self.fp_module = (model.get_submodule(unit.name) for model in (job.network, job.folded))
        self.activation = job.folded.get_submodule(unit.activation) if unit.activation else None
        self._recipe, self._stage, self._iters = job.recipe, stage, job.settings.iters_of(stage)
        self._batch_size, self._generator = job.settings.batch_size, job.generator
        layers = [job.network.get_submodule(name) for name in unit.layers]
        self._layers = [layer for layer in layers if layer.weight_quantizer is not None]
        self._entry: ActivationQuantizer | None = getattr(self.module, "input_quantizer", None)
        self._quantizers = [m for m in self.module.modules() if isinstance(m, ActivationQuantizer)]

    def finish(self, bar: tqdm) -> None:
        """Take all steps, and show them in ``bar``."""
        end, recent = bar.n + self._iters, []
        for step, error in enumerate(self.steps()):
            recent.append(error)
            if step % _CHECK_EVERY == 0 or step == self._iters - 1:
                for number, loss in enumerate(torch.stack(recent).tolist(), step + 1 - len(recent)):
                    if not math.isfinite(loss):
                        raise FloatingPointError(
                            f"the reconstruction loss of {self.unit.name} is {loss} at step {number}"
                        )
                recent.clear()
                bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
                bar.update(end - self._iters + step - bar.n)
                logger.debug("%s step %d: loss %.6g", self.unit.name, step, loss)
        bar.update(end - bar.n)

    def steps(self) -> Iterator[Tensor]:
        """Take one optimiser step at a time, and yield the reconstruction error (0-dim) that it started from.

        When all steps have been taken, the weights are on their grid. Where there is nothing to learn, there is no
        step.
        """
        stage, recipe, iters = self._stage, self._recipe, self._iters
        rounding, scales = None, []
        if stage.rounding and self._layers:
            rounding = Rounding([m.weight for m in self._layers], [m.weight_quantizer for m in self._layers])
        if stage.learns_scales:
            scales = [quantizer.scale for quantizer in self._quantizers]
        groups = []
        if rounding is not None:
            groups.append({"params": [rounding.logit], "lr": stage.rounding_lr_for(iters)})
        if scales:
            groups.append({"params": scales, "lr": stage.scale_lr})
        if not groups:
            return
        optimizer = _adam(groups)
        with self._training(rounding, scales):
            for step, chosen in enumerate(self._batches(len(self.data.target))):
                error = self._error(chosen)
                if not error.requires_grad:
                    raise ValueError(
                        f"no gradient reaches what is learned in {self.unit.name} ({type(self.module).__name__}); take "
                        "torch.no_grad and detach out of its forward pass, or name other blocks"
                    )
                error.backward()
                if rounding is not None:
                    rounding.backward(recipe.penalty_weight, annealed_beta(step, iters, recipe.warm_up, *recipe.beta))
                if scales:
                    optimizer.param_groups[-1]["lr"] = stage.scale_lr * (1 + math.cos(math.pi * step / iters)) / 2
                optimizer.step()
                if rounding is not None:
                    rounding.soften()
                for scale in scales:
                    scale.grad = None
                    scale.data.clamp_(min=torch.finfo(scale.dtype).tiny)
                yield error.detach()
        if rounding is not None:
            for layer, weight in zip(self._layers, rounding.hard(), strict=True):
                layer.harden(weight)

    def _error(self, chosen: Tensor) -> Tensor:
        x, unmixed = self._inputs(chosen)
        outputs = self._output(x if unmixed is None else torch.cat([x, unmixed]))
        target = self.data.target.rows(chosen)
        weights = None if self.data.weights is None else self.data.weights.rows(chosen)
        axis, norm = self.unit.channel_axis, self._stage.error_norm
        if unmixed is None:
            return reconstruction_error(outputs, target, axis, norm, weights)
        error = reconstruction_error(outputs[: len(x)], target, axis, norm, weights)
        few, prediction = chosen[: len(unmixed)], self._recipe.prediction
        predicted = self.data.rest(outputs[len(x) :], few)
        difference = prediction_difference(predicted, self.data.prediction[few], prediction.temperature)
        return error + prediction.weight_for(predicted.shape[1]) * difference

    def _output(self, x: Tensor) -> Tensor:
        output = self.module(x)
        return output if self.activation is None else self.activation(output)

    def weigh(self, batch_size: int) -> None:
        """Weigh the errors by the Fisher information, with the unit's weights rounded as they are now."""
        data = self.data
        with self._rounded_to_nearest():
            weights = fisher_weights(data.rest, self._output, data.input, data.prediction, batch_size)
        self.data = replace(data, weights=weights)

    @contextlib.contextmanager
    def _rounded_to_nearest(self) -> Iterator[None]:
        try:
            for layer in self._layers:
                layer.soft_weight = layer.weight_quantizer(layer.weight)
            yield
        finally:
            for layer in self._layers:
                layer.soft_weight = None

    def _inputs(self, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
        """The unit's inputs: quantized, or with QDrop's share of FP elements, and where the recipe compares
        predictions those of some images without FP elements. The entry quantizer has done its work and passes."""
        keep, prediction = self._recipe.keep_probability, self._recipe.prediction
        x = self.data.input.rows(chosen)
        otherwise = self.data.fp_input.rows(chosen) if keep < 1 else None
        few = None if prediction is None else x[: max(1, round(prediction.share * len(x)))]
        if self._entry is not None and self._stage.quantize_activations:
            return self._entry.mix(x, otherwise), None if few is None else self._entry.mix(few, keep=1.0)
        if otherwise is not None:
            x = torch.lerp(otherwise, x, coin_flips(x, keep, self._generator))
        return x, few

    def _batches(self, count: int) -> Iterator[Tensor]:
        size = min(self._batch_size, count)
        for _ in range(self._iters):
            yield torch.randperm(count, generator=self._generator, device=self._generator.device)[:size]

    @contextlib.contextmanager
    def _training(self, rounding: Rounding | None, scales: list[nn.Parameter]) -> Iterator[None]:
        """Set the unit up for the stage; everything but what was learned is as before afterwards, whatever happens."""
        keep, generator = self._recipe.keep_probability, self._generator
        with contextlib.ExitStack() as stack:
            for quantizer in self._quantizers:
                bypass = quantizer is self._entry or not self._stage.quantize_activations
                stack.enter_context(quantizer.training_with(keep, bypass, generator))
            for scale in scales:
                scale.requires_grad_(True)
            if rounding is not None:
                for layer, weight in zip(self._layers, rounding.weights, strict=True):
                    layer.soft_weight = weight
            try:
                yield
            finally:
                for scale in scales:
                    scale.requires_grad_(False)
                    scale.grad = None
                for layer in self._layers:
                    layer.soft_weight = None


def _adam(groups: list[dict[str, object]]) -> torch.optim.Adam:
    try:
        return torch.optim.Adam(groups, fused=True)
    except RuntimeError:  # a device that has no fused version
        return torch.optim.Adam(groups)
