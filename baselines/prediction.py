"""What the rest of the network makes of a unit's output."""

from __future__ import annotations

import contextlib
import logging

import torch
from torch import Tensor, nn

from baselines.capture import Cached, forward_replaced, returning
from baselines.trace import tensors_in

logger = logging.getLogger(__name__)

_EXAMPLES = 2


@torch.no_grad()
def predictions(network: nn.Module, inputs: Cached, batch_size: int) -> Tensor:
    """The network's predictions ``(N, ...)`` for all inputs; of several outputs the first."""
    return torch.cat([prediction_of(network(batch)) for batch in inputs.batches(batch_size)])


def prediction_of(output: object) -> Tensor:
    """The first tensor of whatever a network returns."""
    return tensors_in(output)[0]


class RestOfNetwork:
    """The part of a network behind one of its modules, as a function of that module's output.

    The network's own forward pass runs with the module's output replaced, so that whatever it computes outside of
    modules happens as always. Units that have been passed are not computed: they give NaN. Where that reaches the
    prediction, the network has a connection past the module, and these units are computed after all.

    Args:
        network: the network, without gradients.
        inputs: its inputs ``(N, ...)``.
        module: name of the module whose output is replaced.
        passed: modules called before, with the shape of their outputs less the first axis.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Cached,
        module: str,
        passed: list[tuple[str, torch.Size]],
    ) -> None:
        self._network, self._inputs = network, inputs
        self._module = network.get_submodule(module)
        self._passed = [(network.get_submodule(name), shape) for name, shape in passed]

    def check(self, output: Cached) -> None:
        """Find out, with the first of the module's outputs ``(N, ...)``, whether a connection passes the module."""
        few = torch.arange(min(_EXAMPLES, len(output)))
        with torch.no_grad():
            if self._passed and torch.isnan(self(output.rows(few), few)).any():
                logger.debug("a connection passes %s: the units before are computed", type(self._module).__name__)
                self._passed = []

    def __call__(self, output: Tensor, chosen: Tensor) -> Tensor:
        """The prediction ``(n, ...)`` for the module's output ``(n, ...)`` on the inputs ``chosen (n,)``, indices."""
        with contextlib.ExitStack() as stack:
            for module, shape in self._passed:
                nothing = output.new_full((len(output), *shape), torch.nan)
                stack.enter_context(forward_replaced(module, returning(nothing)))
            stack.enter_context(forward_replaced(self._module, returning(output.clone())))
            return prediction_of(self._network(self._inputs.rows(chosen)))
