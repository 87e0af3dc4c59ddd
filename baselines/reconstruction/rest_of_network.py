"""What the rest of the network makes of a unit's output."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from baselines.network.trace import EXAMPLES, tensors_in
from baselines.network.units import Unit
from baselines.reconstruction.cache import Cached
from baselines.reconstruction.losses import prediction_difference
from baselines.reconstruction.streams import forward_replaced, returning

logger = logging.getLogger(__name__)

_MASKED = -1e4
"""A logit of masked classes: their probability is zero in every type."""


@torch.no_grad()
def predictions(network: nn.Module, inputs: Cached, batch_size: int) -> Tensor:
    """The network's predictions (N, C, ...) for all inputs, see `prediction_of`.

    Raises:
        ValueError: the network gives no scores of classes.
    """
    found = torch.cat([_for_losses(prediction_of(network(batch))) for batch in inputs.batches(batch_size)])
    if found.dim() < 2 or not found.is_floating_point():
        raise ValueError(
            f"the network's outputs, {tuple(found.shape)} of {found.dtype}, are no class scores (N, C), so predictions "
            "cannot be compared; choose a method that only reconstructs"
        )
    return found


def prediction_of(output: object) -> Tensor:
    """The first tensor of whatever a network returns, or of what it calls `logits`."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return tensors_in(output if logits is None else logits)[0]


def _for_losses(prediction: Tensor) -> Tensor:
    """`prediction` with a number that losses can take for minus infinity, by which a network masks classes."""
    return prediction.nan_to_num(torch.nan, torch.inf, _MASKED) if prediction.is_floating_point() else prediction


class RestOfNetwork:
    """The part of a network behind one of its units, as a function of that unit's output.

    The network's own forward pass runs with the unit's output replaced, behind its activation if it has one, so that
    whatever it computes outside of modules happens as always. Units that have been passed are not computed: they give
    anything, in `check` NaN. Where that reaches the prediction, the network has a connection past the unit, and
    they are computed after all.

    Args:
        network: the network, without gradients.
        inputs: its inputs (N, ...).
        unit: whose output is replaced.
        passed: names of the units before, with the shape of their outputs less the first axis.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Cached,
        unit: Unit,
        passed: list[tuple[str, torch.Size]],
    ) -> None:
        self._network, self._inputs = network, inputs
        self._unit = network.get_submodule(unit.name)
        self._activation = network.get_submodule(unit.activation) if unit.activation else None
        self._name = unit.name
        self._passed = [(network.get_submodule(name), shape) for name, shape in passed]
        self._new: Callable[[Tensor, tuple[int, ...]], Tensor] = _nans

    def check(self, output: Cached) -> None:
        """Find out, with the first of the unit's outputs (N, ...), whether a connection passes the unit.

        Raises:
            ValueError: no gradient comes back from the prediction although it depends on the output.
        """
        few = torch.arange(min(EXAMPLES, len(output)), device=output.tensor.device)
        value = output.rows(few).requires_grad_()
        with torch.enable_grad():
            prediction = self(value, few)
        if self._passed and torch.isnan(prediction).any():
            logger.debug("a connection passes %s: the units before are computed", self._name)
            self._passed = []
        if not prediction.requires_grad and torch.isnan(self(torch.full_like(value, torch.nan), few)).any():
            raise ValueError(
                f"no gradient comes back to {self._name} from the outputs of {type(self._network).__name__}, which is "
                "what the method looks at; take torch.no_grad and detach out of its forward pass, or choose a method "
                "that only reconstructs"
            )
        self._new = Tensor.new_empty  # they are not looked at

    def __call__(self, output: Tensor, chosen: Tensor) -> Tensor:
        """The prediction (n, ...) for the unit's output (n, ...) on the inputs `chosen` (n,), indices."""
        with contextlib.ExitStack() as stack:
            for module, shape in self._passed:
                anything = _making(self._new, output, (len(output), *shape))
                stack.enter_context(forward_replaced(module, anything))
            value = output.clone()  # the network may write into it
            if self._activation is not None:
                before, forward = torch.full_like(output, torch.nan), self._activation.forward
                # Other calls of the same module are not those behind the unit.
                instead = functools.partial(_given, before, value, forward)
                stack.enter_context(forward_replaced(self._activation, instead))
                value = before
            stack.enter_context(forward_replaced(self._unit, returning(value)))
            return _for_losses(prediction_of(self._network(self._inputs.rows(chosen))))


def _nans(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.new_full(shape, torch.nan)


def _making(
    new: Callable[[Tensor, tuple[int, ...]], Tensor], like: Tensor, shape: tuple[int, ...]
) -> Callable[..., Tensor]:
    """A forward pass that makes what it gives when it is called, so that what all units give is not there at once."""
    return lambda *args, **kwargs: new(like, shape)


def _given(before: Tensor, value: Tensor, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """`value` for the input `before`, for any other what `forward` makes of it."""
    return value if input is before else forward(input)


def fisher_weights(
    rest: RestOfNetwork, output: Callable[[Tensor], Tensor], inputs: Cached, prediction: Tensor, batch_size: int
) -> Cached:
    """The diagonal of the Fisher information of a unit's output (N, ...), scaled to a mean of 1.

    For each image, the squared gradient of `KL(FP || quantized)` of the predictions by each element of the output
    (BRECQ, arXiv 2102.05426, eq. 10). The authors' code adds 1 to the gradients of a batch's mean before it squares
    them, which leaves little of their differences; here they are taken as they are.

    Args:
        rest: what follows the unit.
        output: the quantized unit, with its activation.
        inputs: the quantized unit's inputs (N, ...).
        prediction: of the FP network (N, C, ...).
    """
    plan = replace(inputs.plan, dtype=None)  # squares may be smaller than half precision can hold
    weights = Cached.collect(_squared_gradients(rest, output, inputs, prediction, batch_size), len(inputs), plan)
    mean = weights.tensor.mean()
    if not 0 < mean < torch.inf:
        logger.warning("no gradient reaches the predictions, so all errors count alike")
        weights.tensor.fill_(1)
    else:
        weights.tensor.div_(mean)
    return weights


def _squared_gradients(
    rest: RestOfNetwork, output: Callable[[Tensor], Tensor], inputs: Cached, prediction: Tensor, batch_size: int
) -> Iterator[Tensor]:
    for start in range(0, len(inputs), batch_size):
        chosen = torch.arange(start, min(start + batch_size, len(inputs)), device=prediction.device)
        with torch.no_grad():
            value = output(inputs.batch(start, batch_size))
        value.requires_grad_()
        with torch.enable_grad():
            loss = len(chosen) * prediction_difference(rest(value, chosen), prediction[chosen], 1.0)
        if not loss.requires_grad:  # the prediction does not depend on the unit
            yield torch.zeros_like(value)
            continue
        (gradient,) = torch.autograd.grad(loss, value)
        yield gradient.square()
