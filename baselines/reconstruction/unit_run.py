"""One stage on one unit: what its quantized twin learns, step by step."""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from baselines.network.units import Unit
from baselines.quantization.operations import coin_flips
from baselines.quantization.quantizers import ActivationQuantizer
from baselines.recipes import Stage
from baselines.reconstruction.cache import Cached
from baselines.reconstruction.job import Job
from baselines.reconstruction.losses import prediction_difference, reconstruction_error
from baselines.reconstruction.rest_of_network import RestOfNetwork, fisher_weights
from baselines.reconstruction.rounding import Rounding
from baselines.reconstruction.rounding_regulariser import annealed_beta

logger = logging.getLogger(__name__)

_CHECK_EVERY = 50


@dataclass(frozen=True)
class UnitData:
    """Calibration data of one unit: its inputs in both networks and the FP output behind the activation; where
    predictions are compared, those of the FP network (N, C, ...) and what makes them of the unit's outputs;
    where errors are weighted, their weights."""

    fp_input: Cached
    input: Cached
    target: Cached
    prediction: Tensor | None = None
    rest: RestOfNetwork | None = None
    weights: Cached | None = None


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
        """Take all steps, and show them in `bar`."""
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
        with self._training(rounding, scales), contextlib.ExitStack() as stack:
            for step, chosen in enumerate(self._batches(len(self.data.target))):
                state = self._generator.get_state() if step == 0 else None
                try:
                    error = self._error_with_gradients(chosen)
                except RuntimeError as failure:
                    if step > 0 or "modified by an inplace operation" not in str(failure):
                        raise
                    # The unit writes into what a layer has read: keep copies, at a price that other units do not pay.
                    stack.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
                    self._generator.set_state(state)
                    for leaf in (*scales, *(rounding.weights if rounding is not None else ())):
                        leaf.grad = None
                    error = self._error_with_gradients(chosen)
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

    def _error_with_gradients(self, chosen: Tensor) -> Tensor:
        error = self._error(chosen)
        if not error.requires_grad:
            raise ValueError(
                f"no gradient reaches what is learned in {self.unit.name} ({type(self.module).__name__}); take "
                "torch.no_grad and detach out of its forward pass, or name other blocks"
            )
        error.backward()
        return error

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
