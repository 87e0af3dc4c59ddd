"""One stage on one unit: what its quantized twin learns, step by step."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
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
from baselines.reconstruction.optimiser import adam
from baselines.reconstruction.recording import Repeated, recorder_for
from baselines.reconstruction.rest_of_network import RestOfNetwork, fisher_weights
from baselines.reconstruction.rounding import Rounding
from baselines.reconstruction.rounding_regulariser import annealed_beta

logger = logging.getLogger(__name__)

_CHECK_EVERY = 50
FEWEST_RECORDED = 20
"""Steps, under which a record does not pay."""

Step = Callable[..., Tensor]


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

    @property
    def stays_on_device(self) -> bool:
        """Whether batches are taken of it without a copy from elsewhere."""
        kept = self.fp_input, self.input, self.target, self.weights
        return all(each is None or each.plan.device == each.plan.compute_device for each in kept)


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
        self._device = job.generator.device
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

    def steps(self, *, record: bool = True) -> Iterator[Tensor]:
        """Take one optimiser step at a time, and yield the reconstruction error (0-dim) that it started from.

        Where the device can, steps are recorded once and launched as a whole, unless `record` is false.

        When all steps have been taken, the weights are on their grid. Where there is nothing to learn, there is no
        step.
        """
        stage, iters = self._stage, self._iters
        rounding, scales = None, []
        if stage.rounding and self._layers:
            rounding = Rounding([m.weight for m in self._layers], [m.weight_quantizer for m in self._layers])
        if stage.learns_scales:
            scales = [quantizer.scale for quantizer in self._quantizers]
        if rounding is None and not scales:
            return
        with self._training(rounding, scales), contextlib.ExitStack() as stack:
            if recorder_for(self._device) is not None:
                record = record and iters >= FEWEST_RECORDED and self.data.stays_on_device
                yield from self._steps_on_device(rounding, scales, stack, record)
            else:
                step = self._step(rounding, scales)
                for number, chosen in enumerate(self._batches()):
                    given = chosen, *self._annealed(number)
                    yield step(*given) if number else self._first(step, given, stack)
        if rounding is not None:
            for layer, weight in zip(self._layers, rounding.hard(), strict=True):
                layer.harden(weight)

    def _step(self, rounding: Rounding | None, scales: list[nn.Parameter], on_device: bool = False) -> Step:
        """What takes an optimiser step and gives the error (0-dim) that it started from. Where all that changes from
        step to step comes as tensors `on_device`, the step touches nothing else and can be recorded."""
        groups = []
        if rounding is not None:
            groups.append({"params": [rounding.logit], "lr": self._stage.rounding_lr_for(self._iters)})
        if scales:
            lr = self._stage.scale_lr
            groups.append(
                {
                    "params": scales,
                    "lr": torch.tensor(lr, dtype=torch.float32, device=self._device) if on_device else lr,
                }
            )
        optimizer = adam(groups, on_device=on_device)
        leaves = [*scales, *(rounding.weights if rounding is not None else ())]

        def step(
            chosen: Tensor, penalty: float | Tensor, beta: float | Tensor | None, scale_lr: float | Tensor
        ) -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            error = self._error_with_gradients(chosen)
            if rounding is not None:
                rounding.backward(penalty, beta)
            if scales and on_device:
                optimizer.param_groups[-1]["lr"].copy_(scale_lr)
            elif scales:
                optimizer.param_groups[-1]["lr"] = scale_lr
            optimizer.step()
            if rounding is not None:
                rounding.soften()
            for scale in scales:
                scale.data.clamp_(min=torch.finfo(scale.dtype).tiny)
            return error.detach()

        return step

    def _annealed(self, step: int) -> tuple[float, float | None, float]:
        """Weight and exponent of the rounding penalty, without an exponent where there is none yet, and the learning
        rate of the scales."""
        recipe, iters = self._recipe, self._iters
        scale_lr = self._stage.scale_lr * (1 + math.cos(math.pi * step / iters)) / 2
        return recipe.penalty_weight, annealed_beta(step, iters, recipe.warm_up, *recipe.beta), scale_lr

    def _first(self, step: Step, given: tuple, stack: contextlib.ExitStack) -> Tensor:
        """The first step; units that write into what a layer has read keep copies from here on, at a price that
        others do not pay."""
        state = self._generator.get_state()
        try:
            return step(*given)
        except RuntimeError as failure:
            if "modified by an inplace operation" not in str(failure):
                raise
            stack.enter_context(torch.autograd.graph.allow_mutation_on_saved_tensors())
            self._generator.set_state(state)
            return step(*given)

    def _steps_on_device(
        self, rounding: Rounding | None, scales: list[nn.Parameter], stack: contextlib.ExitStack, record: bool
    ) -> Iterator[Tensor]:
        """The steps on a device that can record what they launch: all that changes between them lies there before.
        Whether they are recorded makes no difference to the random numbers."""
        device, iters = self._device, self._iters
        step = self._step(rounding, scales, on_device=True)
        last, table = self._recipe.beta[1], []
        for weight, beta, lr in map(self._annealed, range(iters)):
            table.append((0.0, last, lr) if beta is None else (weight, beta, lr))
        table, batches = torch.tensor(table, dtype=torch.float32, device=device), torch.stack(list(self._batches()))
        now = torch.zeros(1, dtype=torch.int64, device=device)
        errors = torch.full((iters,), torch.nan, dtype=torch.float32, device=device)  # of steps that are not taken

        def given() -> tuple[Tensor, ...]:
            return batches.index_select(0, now)[0], *table.index_select(0, now)[0]

        def keep(error: Tensor) -> None:
            errors.index_copy_(0, now, error.to(errors.dtype).view(1))
            now.add_(1)

        keep(self._first(step, given(), stack))
        yield errors[0]
        again = Repeated(lambda: keep(step(*given())), device, self._generator, record=record)
        for number in range(1, iters):
            again()
            yield errors[number]

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
        outputs, of_unmixed = outputs.split([len(x), len(unmixed)])
        error = reconstruction_error(outputs, target, axis, norm, weights)
        few, prediction = chosen[: len(unmixed)], self._recipe.prediction
        predicted = self.data.rest(of_unmixed, few)
        difference = prediction_difference(predicted, self.data.prediction[few], prediction.temperature)
        return error + prediction.weight_for(predicted.shape[1]) * difference

    def _output(self, x: Tensor) -> Tensor:
        output = self.unit.arguments.of(self.module)(x)
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
        if otherwise is not None and x.is_floating_point():
            x = torch.lerp(otherwise, x, coin_flips(x, keep, self._generator))
        return x, few

    def _batches(self) -> Iterator[Tensor]:
        count = len(self.data.target)
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
