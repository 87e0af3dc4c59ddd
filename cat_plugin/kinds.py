"""What the numbers of an output mean: logits of exclusive classes, of labels that do not exclude each other, or values.

All three are natural parameters of an exponential family, so one divergence serves them: with the family's
log-partition function A and its mean p = A', that of an output z from full-precision z' is
`A(z) - A(z') - p(z') (z - z')`: KL(FP || output) of classes, the sum of that of labels, or half the squared error of
values.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus


@dataclasses.dataclass(frozen=True, eq=False)
class OutputKind:
    """One of `KINDS`.

    =============  ====================================================================================
    field          meaning
    =============  ====================================================================================
    name           as in `CATConfig.output_kind`
    means          (n, C) probabilities, or values, of outputs (n, C)
    partition      (n,) log-partition function of outputs
    quadratic      (n,) second derivative of it at means (n, C) along a direction (n, C)
    decisions      (n, d) int64 what is predicted; None: outputs are no predictions of classes
    centred        outputs without what changes no probability
    at_once        partition and means, at little more than the cost of the second; None: there is no such way
    =============  ====================================================================================
    """

    name: str
    means: Callable[[Tensor], Tensor]
    partition: Callable[[Tensor], Tensor]
    quadratic: Callable[[Tensor, Tensor], Tensor]
    decisions: Callable[[Tensor], Tensor] | None
    centred: Callable[[Tensor], Tensor] = lambda outputs: outputs
    at_once: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    def partition_and_means(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Both of `outputs` (n, C), (n,) and (n, C); not for gradients."""
        if self.at_once is not None:
            return self.at_once(outputs)
        return self.partition(outputs), self.means(outputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(n,) divergence of `outputs` (n, C) from the means `targets` (n, C), up to what only these say."""
        return self.partition(outputs) - (targets * outputs).sum(dim=1)

    def divergence(self, f: Tensor, outputs: Tensor) -> Tensor:
        """(n,) divergence of `outputs` from those of full precision `f`, both (n, C)."""
        return self.loss(outputs, self.means(f)) - self.loss(f, self.means(f))

    def agreeing(self, f: Tensor, outputs: Tensor) -> Tensor:
        """(n, d) bool, whether decisions are those of `f`; both are (n, C)."""
        return self.decisions(f) == self.decisions(outputs)


def _softmax_quadratic(means: Tensor, direction: Tensor) -> Tensor:
    weighted = means * direction
    return (weighted * direction).sum(dim=1) - weighted.sum(dim=1).square()


def _softmax_at_once(outputs: Tensor) -> tuple[Tensor, Tensor]:
    # The largest logit less the logarithm of its probability: logsumexp takes twice as long.
    means = outputs.softmax(dim=1)
    return outputs.amax(dim=1) - means.amax(dim=1).log(), means


SOFTMAX = OutputKind(
    "softmax",
    lambda outputs: outputs.softmax(dim=1),
    lambda outputs: outputs.logsumexp(dim=1),
    _softmax_quadratic,
    lambda outputs: outputs.argmax(dim=1, keepdim=True),
    lambda outputs: outputs - outputs.mean(dim=1, keepdim=True),
    _softmax_at_once,
)
SIGMOID = OutputKind(
    "sigmoid",
    torch.sigmoid,
    lambda outputs: softplus(outputs).sum(dim=1),
    lambda means, direction: (means * (1 - means) * direction.square()).sum(dim=1),
    lambda outputs: (outputs > 0).long(),
)
VALUE = OutputKind(
    "value",
    lambda outputs: outputs,
    lambda outputs: outputs.square().sum(dim=1) / 2,
    lambda means, direction: direction.square().sum(dim=1),
    None,
)
KINDS = {kind.name: kind for kind in (SOFTMAX, SIGMOID, VALUE)}
