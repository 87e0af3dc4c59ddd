"""Calibration data pulled towards what the network saw in training: the statistics that its batch norms keep."""

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from baselines.network.batch_norm_folding import BATCH_NORMS
from baselines.network.trace import trace
from baselines.recipes import Correction
from baselines.reconstruction.cache import Cached
from baselines.reconstruction.optimiser import adam

logger = logging.getLogger(__name__)

_EPS = 1e-6
"""Added to variances under the root, as in the PD-Quant authors' code."""


class Corrector:
    """Changes the inputs of units a little, so that what reaches their batch norms has the running statistics.

    The distribution correction of PD-Quant (arXiv 2212.07048). Means and standard deviations are those of a batch of
    images, as batch norms took them. The authors' code takes those of single images, which makes images of different
    classes alike: on CIFAR-10 that cost more accuracy than the correction brought.

    Args:
        network: the FP network with its batch norms unfolded; it is not changed.
        example: inputs of the network (N, ...).
    """

    def __init__(self, network: nn.Module, example: Tensor, correction: Correction) -> None:
        self._network = network
        self._correction = correction
        self._record = trace(network, example)
        if not any(_has_statistics(module) for module in network.modules()):
            logger.info("no batch norm, so the inputs of the units are not corrected")

    def correct(self, unit: str, inputs: Cached, batch_size: int) -> Cached:
        """Corrected inputs (N, ...) of `unit`; `inputs` itself where no batch norm is in the unit or directly
        behind it, and where they are integers."""
        module = self._network.get_submodule(unit)
        inside = [norm for norm in module.modules() if _has_statistics(norm)]
        behind = self._norm_behind(unit)
        if (not inside and behind is None) or not inputs.dtype.is_floating_point:
            return inputs
        # As large as each other: statistics of a small remainder would not be those of the network.
        run = self._record.of(unit)[0].arguments.of(module)
        batches = (self._corrected(run, inside, behind, x) for x in inputs.even_batches(batch_size))
        return Cached.collect(batches, len(inputs), inputs.plan)

    def _norm_behind(self, unit: str) -> nn.Module | None:
        """The batch norm that reads the output of `unit`, if there is one; it was folded into the unit."""
        output = self._record.of(unit)[0].output
        readers = [] if output is None else self._record.readers(output)
        return next((call.module for call in readers if _has_statistics(call.module)), None)

    def _corrected(
        self, unit: Callable[[Tensor], Tensor], inside: list[nn.Module], behind: nn.Module | None, start: Tensor
    ) -> Tensor:
        correction, x = self._correction, start.clone().requires_grad_()
        optimizer = adam([{"params": [x], "lr": correction.lr}])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=correction.steps)
        for _ in range(correction.steps):
            with _inputs_of(inside) as reached:
                output = unit(x.clone())  # a unit may write into its input
            if behind is not None:
                reached.append((behind, output))
            distances = (distance_to_statistics(norm, value) for norm, value in reached)
            distance = sum(distances, start=x.new_zeros(()))
            # Of `closeness` times the squared way from the start, summed over channels and averaged over the rest.
            x.grad = (x.detach() - start).mul_(2 * correction.closeness * x.shape[1] / x.numel())
            if distance.requires_grad:  # a norm may see nothing of the input
                x.grad += torch.autograd.grad(distance, x)[0]
            optimizer.step()
            schedule.step()
        return x.detach()


def distance_to_statistics(norm: nn.Module, value: Tensor) -> Tensor:
    """Squared distance of a batch's means and standard deviations from those that `norm` keeps, summed over channels.
    `value` is (N, C, ...); with fewer than two values of a channel it is 0."""
    if value.numel() < 2 * value.shape[1]:
        return value.new_zeros(())
    return _Distance.apply(value, norm.running_mean, (norm.running_var + _EPS).sqrt())


class _Distance(torch.autograd.Function):
    """That of `value` (N, C, ...) from means and standard deviations (C,).

    Its gradient is, channel by channel, a scale and an offset of the values, so it takes one pass over them. On a CPU,
    PyTorch's `var_mean` takes twelve times as long as two means. Sums of half precision are those of float32.
    """

    @staticmethod
    def forward(ctx, value, target_mean, target_deviation):
        axes = [axis for axis in range(value.dim()) if axis != 1]
        count = value.numel() // value.shape[1]
        ctx.dtype, ctx.shape = value.dtype, [-1 if axis == 1 else 1 for axis in range(value.dim())]
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        mean = value.mean(axes)
        variance = (value - mean.view(ctx.shape)).square_().mean(axes) * (count / (count - 1))
        deviation = (variance + _EPS).sqrt()
        too_high, too_wide = mean - target_mean, deviation - target_deviation
        slope = 2 * too_wide / ((count - 1) * deviation)
        ctx.save_for_backward(value, slope, 2 * too_high / count - slope * mean)
        return (too_high.square() + too_wide.square()).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        value, slope, offset = ctx.saved_tensors
        whole = torch.addcmul((grad * offset).view(ctx.shape), value, (grad * slope).view(ctx.shape))
        return whole.to(ctx.dtype), None, None


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, BATCH_NORMS) and module.running_mean is not None


@contextlib.contextmanager
def _inputs_of(modules: list[nn.Module]) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Within the context, what these modules get is recorded."""
    reached: list[tuple[nn.Module, Tensor]] = []

    def watch(module: nn.Module, args: tuple) -> None:
        reached.append((module, args[0]))

    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(watch))
        yield reached
