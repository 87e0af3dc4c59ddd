"""The reconstruction engine: walks through the units and makes each quantized one reproduce its FP twin."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from baselines.capture import Stream
from baselines.losses import annealed_beta, reconstruction_error, rounding_penalty
from baselines.quantizers import ActivationQuantizer, Rounding, coin_flips
from baselines.recipes import Recipe, Stage
from baselines.units import Unit, quantized_layers

logger = logging.getLogger(__name__)

_CHECK_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run may choose beside the recipe: steps a unit and stage (None: as published), images a step, images a
    capturing pass."""

    iters: int | None
    batch_size: int
    capture_batch_size: int
    progress: bool


@dataclass(frozen=True)
class _Data:
    """Calibration data of one unit: its inputs in both networks and the FP output behind the activation."""

    fp_input: Tensor
    input: Tensor
    target: Tensor


def reconstruct(
    folded: nn.Module,
    network: nn.Module,
    units: list[Unit],
    inputs: Tensor,
    recipe: Recipe,
    settings: RunSettings,
    generator: torch.Generator,
) -> None:
    """Reconstruct ``network`` unit by unit, in place, then harden all weights.

    Args:
        folded: the FP twin; same module names as ``network``.
        network: the quantized network, with ranges set.
        units: in calling order.
        inputs: calibration inputs ``(N, ...)``.

    Raises:
        FloatingPointError: the loss of a unit became NaN or infinite; says which unit and which step.
    """
    layers_in_units = {name for unit in units for name in unit.layers}
    _harden(network, quantized_layers(network).keys() - layers_in_units)
    for stage in recipe.stages:
        if not stage.rounding:
            _harden(network, layers_in_units)
        iters = stage.iters if settings.iters is None else settings.iters
        if iters > 0:
            with _activations_bypassed(network, not stage.quantize_activations):
                _walk(folded, network, units, inputs, _Plan(recipe, stage, iters, settings, generator))
    _harden(network, quantized_layers(network))


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


@dataclass(frozen=True)
class _Plan:
    """What all units of one stage have in common."""

    recipe: Recipe
    stage: Stage
    iters: int
    settings: RunSettings
    generator: torch.Generator


def _walk(folded: nn.Module, network: nn.Module, units: list[Unit], inputs: Tensor, plan: _Plan) -> None:
    """One stage: both streams come to each unit, it is reconstructed, and they pass on."""
    size, device = plan.settings.capture_batch_size, plan.generator.device
    fp_stream, stream = (Stream(model, inputs, size, device) for model in (folded, network))
    with tqdm(total=len(units), unit="unit", disable=not plan.settings.progress, leave=False) as bar:
        for unit in units:
            bar.set_description(unit.name)
            fp_input, q_input = fp_stream.arrive(unit), stream.arrive(unit)
            target = fp_stream.leave(unit, fp_input)
            activation = folded.get_submodule(unit.activation) if unit.activation else None
            if activation is not None:
                with torch.no_grad():
                    target = activation(target.clone())
            _UnitRun(network, unit, activation, plan).run(_Data(fp_input, q_input, target), bar)
            _harden(network, unit.layers)
            stream.leave(unit, q_input)
            bar.update()


class _UnitRun:
    """One stage on one unit."""

    def __init__(self, network: nn.Module, unit: Unit, activation: nn.Module | None, plan: _Plan) -> None:
        self._unit = unit
        self._module = network.get_submodule(unit.name)
        self._activation = activation
        self._recipe, self._stage, self._iters = plan.recipe, plan.stage, plan.iters
        self._batch_size, self._generator = plan.settings.batch_size, plan.generator
        self._layers = [m for m in (network.get_submodule(n) for n in unit.layers) if m.weight_quantizer is not None]
        self._entry: ActivationQuantizer | None = getattr(self._module, "input_quantizer", None)
        self._quantizers = [m for m in self._module.modules() if isinstance(m, ActivationQuantizer)]

    def run(self, data: _Data, bar: tqdm) -> None:
        stage, recipe, iters = self._stage, self._recipe, self._iters
        rounding = scales = None
        if stage.rounding and self._layers:
            rounding = Rounding([m.weight for m in self._layers], [m.weight_quantizer for m in self._layers])
            rounding_optimizer = torch.optim.Adam([rounding.logit], lr=stage.rounding_lr_for(iters))
        if stage.activation_scales and stage.quantize_activations and self._quantizers:
            scales = [quantizer.scale for quantizer in self._quantizers]
            scale_optimizer = torch.optim.Adam(scales, lr=stage.scale_lr)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(scale_optimizer, T_max=iters)
        if rounding is None and scales is None:
            return
        with self._training(scales or []):
            for step, chosen in enumerate(self._batches(len(data.target))):
                loss = error = self._error(data, chosen, rounding)
                beta = annealed_beta(step, iters, recipe.warm_up, *recipe.beta)
                if rounding is not None and beta is not None:
                    loss = error + recipe.penalty_weight * rounding_penalty(self._fraction, beta)
                self._check(error, step, bar)
                loss.backward()
                if rounding is not None:
                    rounding_optimizer.step()
                    rounding_optimizer.zero_grad()
                if scales is not None:
                    scale_optimizer.step()
                    scale_optimizer.zero_grad()
                    schedule.step()
                    for scale in scales:
                        scale.data.clamp_(min=torch.finfo(scale.dtype).tiny)
        if rounding is not None:
            for layer, weight in zip(self._layers, rounding.hard(), strict=True):
                layer.harden(weight)

    def _error(self, data: _Data, chosen: Tensor, rounding: Rounding | None) -> Tensor:
        if rounding is not None:
            weights, self._fraction = rounding.soft()
            for layer, weight in zip(self._layers, weights, strict=True):
                layer.soft_weight = weight
        x = self._mixed_input(data.input[chosen], data.fp_input, chosen)
        output = self._module(x)
        if self._activation is not None:
            output = self._activation(output)
        return reconstruction_error(output, data.target[chosen], self._unit.channel_axis, self._stage.error_norm)

    def _mixed_input(self, x: Tensor, fp_input: Tensor, chosen: Tensor) -> Tensor:
        """The unit's input: quantized, or with QDrop's share of FP elements; the entry quantizer then passes."""
        keep = self._recipe.keep_probability
        if self._entry is not None and self._stage.quantize_activations:
            return self._entry.mix(x, fp_input[chosen] if keep < 1 else None)
        if keep < 1:
            return torch.lerp(fp_input[chosen], x, coin_flips(x, keep, self._generator))
        return x

    def _batches(self, count: int) -> Iterator[Tensor]:
        size = min(self._batch_size, count)
        for _ in range(self._iters):
            yield torch.randperm(count, generator=self._generator, device=self._generator.device)[:size]

    def _check(self, error: Tensor, step: int, bar: tqdm) -> None:
        if step % _CHECK_EVERY and step != self._iters - 1:
            return
        value = error.item()
        if not value < float("inf"):
            raise FloatingPointError(f"the reconstruction loss of {self._unit.name} is {value} at step {step}")
        bar.set_postfix(step=step, loss=f"{value:.4g}", refresh=False)
        logger.debug("%s step %d: loss %.6g", self._unit.name, step, value)

    @contextlib.contextmanager
    def _training(self, scales: list[nn.Parameter]) -> Iterator[None]:
        """Set the unit's quantizers up for the stage; everything is as before afterwards, whatever happens."""
        keep, generator = self._recipe.keep_probability, self._generator
        with contextlib.ExitStack() as stack:
            for quantizer in self._quantizers:
                bypass = quantizer is self._entry or not self._stage.quantize_activations
                stack.enter_context(quantizer.training_with(keep, bypass, generator))
            for scale in scales:
                scale.requires_grad_(True)
            try:
                yield
            finally:
                for scale in scales:
                    scale.requires_grad_(False)
                    scale.grad = None
                for layer in self._layers:
                    layer.soft_weight = None
