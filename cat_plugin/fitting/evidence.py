"""What held-out images say about a correction, and whether it is worth having."""

import dataclasses
import math

from scipy.stats import t as student_t
from torch import Tensor

from cat_plugin.fitting.families import Family
from cat_plugin.fitting.weights import Sample
from cat_plugin.kinds import VALUE
from cat_plugin.metrics import decimals, percent_changed, standard_error

LEVEL = 0.95
"""Of the one-sided interval (Student's t over images) by which the divergence has to fall."""
MIN_AGREEMENT = -1.0
"""Held-out gain in agreement, in standard errors, below which the identity is returned, also where KL falls."""
MIN_CHANGED = 1.0
"""Percentage of predictions that a correction has to change to be worth having."""


LOSS_NAMES = {"softmax": "softened KL", "sigmoid": "softened KL of all labels", "value": "squared error (scaled)"}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A family of maps.

    kl_gain: by how much it lowers the held-out softened divergence, in nats, and kl_gain_error its standard error, as
    in `Evidence`; weight: its share in the correction.
    """

    name: str
    kl_gain: float
    kl_gain_error: float
    weight: float


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What held-out images say about a correction.

    images: how many there were. kl_gain: mean fall of the softened divergence (KL(FP || output) in nats, or of values
    half the squared error in units of their variance), both at the scale that suits them best, and kl_gain_error its
    standard error. changed: percentage of predictions that the correction changes, NaN for values. accepted: whether
    it is used, and reason says why.
    """

    images: int
    kl_gain: float
    kl_gain_error: float
    changed: float
    accepted: bool
    reason: str
    candidates: tuple[Candidate, ...] = ()


def judge(
    outputs: dict[Family, Tensor], weights: dict[Family, float], corrected: Tensor, sample: Sample, alpha: float = 1.0
) -> Evidence:
    """The evidence for a correction whose outputs are `corrected` (n, C), each by maps that were fitted without it.

    Args:
        outputs: (n, C) of every family, and weights: theirs in the correction.
        alpha: how far a family alone would move the outputs; `corrected` have been moved.
    """
    total, kind = sum(weights.values()), sample.shared.kind
    before_loss = sample.divergence(sample.rows.q)

    def fall(output: Tensor) -> tuple[float, float]:
        falls = before_loss - sample.divergence(output)
        return falls.mean().item(), standard_error(falls, sample.owners)

    def moved(output: Tensor) -> Tensor:
        return sample.rows.q + alpha * (output - sample.rows.q)

    candidates = tuple(
        Candidate(family.name, *fall(moved(output.double())), weights[family] / total if total else 0.0)
        for family, output in outputs.items()
    )
    gain, error = fall(corrected)
    verb = "falls" if gain > 0 else "does not fall, it rises"
    size = f"{decimals(abs(gain))} +- {decimals(error)}{'' if kind is VALUE else ' nats'}"
    faults = {f"{LOSS_NAMES[kind.name]} {verb} by {size}": not gain > margin(error, sample.images)}
    changed = _changes(corrected, sample, faults) if kind.decisions else math.nan
    found = [fault for fault, given in faults.items() if given]
    said = "; ".join(found or list(faults)[:2])
    reason = f"{'nothing to gain: ' if found else ''}on held-out images, {said}"
    return Evidence(sample.images, gain, error, changed, not found, reason, candidates)


def margin(error: float, images: int) -> float:
    """By how much the divergence has to fall, where the fall over so many images has that standard error."""
    return float(student_t.ppf(LEVEL, max(images - 1, 1))) * error


def _changes(corrected: Tensor, sample: Sample, faults: dict[str, bool]) -> float:
    """Percentage of the predictions that change; adds to `faults` what they say against the correction."""
    kind, (q, f, *_) = sample.shared.kind, sample.rows
    before, after = kind.agreeing(f, q), kind.agreeing(f, corrected)
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    net = (after.double() - before.double()).sum(dim=1)
    spread = standard_error(net, sample.owners) * len(net) if sample.owners is not None else math.sqrt(won + lost)
    changed = percent_changed(q, corrected, kind)
    faults |= {
        f"{won} predictions come to agree with FP, and {lost} no longer do": won - lost < MIN_AGREEMENT * spread,
        f"a correction would change {changed:.2f} % of the predictions": changed < MIN_CHANGED,
    }
    return changed
