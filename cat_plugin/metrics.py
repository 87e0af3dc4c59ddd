"""Figures of merit on plain tensors, shared by the report and by benchmarks."""

import dataclasses
import math

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from cat_plugin.errors import CATError
from cat_plugin.kinds import SOFTMAX, OutputKind

BOOTSTRAP_SAMPLES = 10_000


def top_k_correct(logits: Tensor, targets: Tensor, k: int = 1) -> Tensor:
    """(N,) bool: is the target (N,) among the `k` largest of the logits (N, C); all classes if k > C."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == targets.unsqueeze(1)).any(dim=1)


def decimals(value: float, sign: str = "") -> str:
    """Four decimals, or two significant digits of what they would show as 0; `sign` is that of a format."""
    return f"{value:{sign}.4f}" if value == 0 or not abs(value) < 5e-5 else f"{value:{sign}.2g}"


def agreement(f: Tensor, out: Tensor, kind: OutputKind = SOFTMAX) -> float:
    """Percentage of predictions that are those of `f`, of the outputs `f` and `out`, both (N, C)."""
    return 100.0 * kind.agreeing(f, out).double().mean().item()


def percent_changed(before: Tensor, after: Tensor, kind: OutputKind = SOFTMAX) -> float:
    """Percentage of predictions that differ between the outputs `before` and `after`, both (N, C)."""
    return 100.0 * (kind.decisions(before) != kind.decisions(after)).double().mean().item()


def agreement_gain(
    f: Tensor, q: Tensor, out: Tensor, images: Tensor | None = None, kind: OutputKind = SOFTMAX
) -> tuple[float, float]:
    """95 % interval of the gain in agreement with `f` from `q` to `out`, all (N, C), in percentage points.

    By paired bootstrap; where rows are positions of `images` (N,), by the normal distribution and the error of the
    mean over images.
    """
    before, after = kind.agreeing(f, q), kind.agreeing(f, out)
    gains = 100.0 * (after.double() - before.double()).mean(dim=1)
    return bootstrap_interval(gains) if images is None else clustered_interval(gains, images)


def standard_error(values: Tensor, images: Tensor | None = None) -> float:
    """Standard error of the mean of `values` (N,).

    Rows of one image, of which `images` (N,) says which they are, are taken as dependent in any way (Liang and Zeger,
    Biometrika 1986).
    """
    if images is None:
        return values.std().item() / math.sqrt(len(values))
    found, index = images.unique(return_inverse=True)
    sums = values.new_zeros(len(found)).index_add_(0, index, values - values.mean())
    return math.sqrt(sums.square().sum().item() * len(found) / max(len(found) - 1, 1)) / len(values)


def kl_divergence(f: Tensor, out: Tensor, kind: OutputKind = SOFTMAX) -> float:
    """Mean over images of KL(FP || output) in nats, of labels summed over them; `f` and `out` are (N, C)."""
    return kind.divergence(f.double(), out.double()).mean().item()


@dataclasses.dataclass(frozen=True)
class PairedStatistics:
    """Comparison of two models on the same images.

    delta: gain in top-1, percentage points, with its 95 % interval `ci_low` to `ci_high` by paired
    bootstrap. p_value: exact two-sided McNemar test. won, lost: images that became right or wrong. All of them are
    positions where outputs have such.
    """

    images: int
    delta: float
    ci_low: float
    ci_high: float
    p_value: float
    won: int
    lost: int


def paired_statistics(
    lq_correct: Tensor, cat_correct: Tensor, seed: int = 0, images: Tensor | None = None
) -> PairedStatistics:
    """Statistics of the gain from `lq_correct` to `cat_correct`, both (N,) bool.

    Where rows are positions of `images` (N,), interval and p-value are those of a normal distribution whose standard
    error is that over images.

    Raises:
        CATError: the two differ in shape or hold no image.
    """
    if lq_correct.shape != cat_correct.shape or lq_correct.ndim != 1 or len(lq_correct) == 0:
        raise CATError(
            f"got shapes {tuple(lq_correct.shape)} and {tuple(cat_correct.shape)}; expected (N,) twice, N >= 1"
        )
    lq_correct, cat_correct = lq_correct.bool(), cat_correct.bool()
    rows = len(lq_correct)
    won, lost = int((cat_correct & ~lq_correct).sum()), int((lq_correct & ~cat_correct).sum())
    gains, delta = 100.0 * (cat_correct.double() - lq_correct.double()), 100.0 * (won - lost) / rows
    if images is None:
        low, high = bootstrap_interval(gains, seed)
        p_value = binomtest(won, won + lost).pvalue if won + lost else 1.0
    else:
        low, high = clustered_interval(gains, images)
        error = standard_error(gains, images)
        p_value = math.erfc(abs(delta) / error / math.sqrt(2)) if error else 1.0
    return PairedStatistics(rows, delta, low, high, float(p_value), won, lost)


@dataclasses.dataclass(frozen=True)
class ClassChanges:
    """How many images (or positions) of a class became right, `won`, and wrong, `lost`.

    num_classes: how many classes there are; labels: those of which an image changed, ascending, to which `won` and
    `lost` belong.
    """

    num_classes: int
    labels: tuple[int, ...]
    won: tuple[int, ...]
    lost: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.labels) == len(self.won) == len(self.lost):
            lengths = len(self.labels), len(self.won), len(self.lost)
            raise CATError(f"labels, won and lost of classes have the lengths {lengths}; expected one length")
        if not all(0 <= label < self.num_classes for label in self.labels):
            raise CATError(f"labels {self.labels} should be from 0 to {self.num_classes - 1}")

    @classmethod
    def of(cls, targets: Tensor, before: Tensor, after: Tensor, num_classes: int) -> "ClassChanges":
        """Of images with `targets` (N,) int64 that were right `before` and are right `after`, both (N,) bool."""
        won, lost = (
            torch.bincount(targets[part], minlength=num_classes) for part in (after & ~before, before & ~after)
        )
        labels = (won + lost).nonzero().squeeze(1)
        return cls(num_classes, *(tuple(part.tolist()) for part in (labels, won[labels], lost[labels])))


def bootstrap_interval(differences: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `differences` (N,), resampled with replacement.

    Takes differences of few distinct values, such as those of correctness: a resample is then one draw of how often
    each value comes, from a multinomial distribution.
    """
    values, counts = np.unique(differences.double().numpy(), return_counts=True)
    images = counts.sum()
    draws = np.random.default_rng(seed).multinomial(images, counts / images, size=BOOTSTRAP_SAMPLES)
    low, high = np.percentile(draws @ values / images, [2.5, 97.5])
    return float(low), float(high)


def clustered_interval(differences: Tensor, images: Tensor) -> tuple[float, float]:
    """95 % interval of the mean of `differences` (N,), of which those of one of `images` (N,) depend on each other."""
    mean, error = differences.mean().item(), standard_error(differences, images)
    return mean - 1.96 * error, mean + 1.96 * error


def percent(correct: Tensor) -> float:
    """Percentage of true values in `correct` (N,) bool."""
    return 100.0 * torch.mean(correct.double()).item()
