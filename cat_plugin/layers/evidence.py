"""What held-out images say about corrections of layers."""

import dataclasses
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from cat_plugin.fitting.divergence import softened_divergence
from cat_plugin.fitting.evidence import LOSS_NAMES, MIN_AGREEMENT, MIN_CHANGED
from cat_plugin.fitting.evidence import margin as margin_of
from cat_plugin.fitting.families import temperature_for
from cat_plugin.kinds import VALUE, OutputKind
from cat_plugin.metrics import agreement, decimals, kl_divergence, percent_changed, standard_error


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """The correction of a layer: its channels, the mean size of `scale - 1`, and that of the offsets, in units of the
    spread of their channel."""

    name: str
    channels: int
    scale: float
    shift: float


@dataclasses.dataclass(frozen=True)
class Closeness:
    """How near outputs on held-out images are to full precision: mean divergence (nats), percentage of predictions that
    agree; None for values."""

    divergence: float
    agreement: float | None

    @classmethod
    def of(cls, f: Tensor, out: Tensor, kind: OutputKind) -> "Closeness":
        """Of the outputs `out` (n, C) where those in full precision are `f`."""
        return cls(kl_divergence(f, out, kind), agreement(f, out, kind) if kind.decisions else None)

    def __str__(self) -> str:
        return decimals(self.divergence) + ("" if self.agreement is None else f", {self.agreement:.2f} % agree")


@dataclasses.dataclass(frozen=True)
class LayersEvidence:
    """What became of the corrections of layers, and why.

    ==============  =====================================================================
    field           meaning
    ==============  =====================================================================
    accepted        whether they are used
    reason          why, in words
    images          that they were fitted on
    layers          what is corrected, in the order of the network
    unreached       names of layers that no gradient reaches, which are left as they are
    rate            of the steps, that held-out images want, see `RATES`
    share           of the way from the identity that held-out images want
    epochs, steps   passes over the images, and steps in each
    curve           held-out divergence before, and after each epoch; a mean over the folds
    plain, output   closeness of the model as it is, and of its corrected output
    inside, both    with corrected layers, and with these and the output corrected
    operations      multiply-adds that they take for an image
    seconds         that the fit took
    ==============  =====================================================================
    """

    accepted: bool
    reason: str
    images: int = 0
    layers: tuple[LayerChange, ...] = ()
    unreached: tuple[str, ...] = ()
    rate: str = ""
    share: float = 0.0
    epochs: int = 0
    steps: int = 0
    curve: tuple[float, ...] = ()
    plain: Closeness | None = None
    output: Closeness | None = None
    inside: Closeness | None = None
    both: Closeness | None = None
    operations: int = 0
    seconds: float = 0.0


def faults(
    kind: OutputKind, f: Tensor, out: Tensor, other: Tensor, owners: Tensor | None, *, margin: bool
) -> Sequence[str]:
    """What speaks against the outputs `out` (n, C) in place of the `other`: a divergence from `f` that does not fall,
    as it is and between softened predictions, each side at the scale that suits it, or with `margin` not by more than
    that of `cat_plugin.fitting.evidence`; predictions that agree less, or with `margin` hardly change.

    As it is, the divergence may fall by a scale of all outputs alone, which changes no prediction.

    owners: (n,), the image of each row, where rows are positions.
    """
    found = []
    images = len(f) if owners is None else len(owners.unique())
    f, out, other = f.double(), out.double(), other.double()
    temperature = temperature_for(f, kind)
    softened = partial(softened_divergence, teacher=kind.means(f / temperature), temperature=temperature, kind=kind)
    falls = {LOSS_NAMES[kind.name]: softened(other) - softened(out)}
    if kind is not VALUE:  # whose scale is their own
        falls["the divergence"] = kind.divergence(f, other) - kind.divergence(f, out)
    for name, fall in falls.items():
        gain, error = fall.mean().item(), standard_error(fall, owners)
        if not gain > (margin_of(error, images) if margin else 0.0):
            found.append(f"{name} changes by {decimals(0.0 - gain, '+')} +- {decimals(error)}")
    if kind.decisions:
        net = (kind.agreeing(f, out).double() - kind.agreeing(f, other).double()).mean(dim=1)
        if net.mean().item() < MIN_AGREEMENT * standard_error(net, owners):
            found.append(f"{-100 * net.mean().item():.2f} % fewer predictions agree with FP")
        changed = percent_changed(other, out, kind)
        if margin and changed < MIN_CHANGED:
            found.append(f"corrections would change {changed:.2f} % of the predictions")
    return found
