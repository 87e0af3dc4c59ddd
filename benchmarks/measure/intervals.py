"""Intervals and p-values of a gain: of the networks at hand, and over seeds, as new ones would be drawn."""

import math
from collections.abc import Callable

from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit
from torch import Tensor

from cat_plugin.metrics import bootstrap_interval, paired_statistics

ALPHA = 0.05
SMALLEST_P = 1e-12  # below, quantiles of Student's t are not to be had; such p-values are 0


def paired_figures(changes: Tensor) -> dict[str, float | int]:
    """Interval, p-value, won and lost of the gains of images `(n_eval,)`, each the mean over seeds, from -1 to 1.

    The interval is a paired bootstrap over images; the p-value is that of the exact sign test on images that more seeds
    put right than wrong, or the reverse, which for one seed is McNemar's. They hold for these networks: other seeds are
    not in them.
    """
    paired = paired_statistics(changes < 0, changes > 0)
    low, high = bootstrap_interval(100.0 * changes)
    return _rounded(low, high, paired.p_value) | {"won": paired.won, "lost": paired.lost}


def figures_over_seeds(changes: Tensor) -> dict[str, float | int]:
    """`paired_figures` of `changes` `(seeds, n_eval)` as `networks_*`, those over seeds and images as `seeds_*`.

    The latter are never better than the former, and for one seed, which tells nothing of others, the same.
    """
    own = paired_figures(changes.mean(0))
    low, high, p_value = own["ci_low"], own["ci_high"], own["p_value"]
    if min(changes.shape) > 1:
        new_low, new_high, new_p = crossed_interval(100.0 * changes)
        low, high, p_value = min(low, new_low), max(high, new_high), max(p_value, new_p)
    networks = {f"networks_{name}": own[name] for name in ("ci_low", "ci_high", "p_value")}
    seeds = {f"seeds_{name}": value for name, value in _rounded(low, high, p_value).items()}
    return networks | seeds | {"won": own["won"], "lost": own["lost"]}


def crossed_interval(gains: Tensor) -> tuple[float, float, float]:
    """95 % interval of the mean of `gains` `(seeds, images)` over new seeds and new images, and the p-value of no gain.

    Both are taken as drawn at random, and every seed sees every image: a gain is the mean, plus an effect of the seed,
    of the image, and of both together (crossed random effects, as Clark, J. Verbal Learning 1973, asks for of subjects
    and words). The error has two parts: that of the seeds' means, by Student's t for as few as there are, and that of
    the images' effects. Their margins are joined as the root of the sum of squares (Howe, JASA 1974), which with two or
    three seeds covers better than Satterthwaite's degrees of freedom. At least two seeds and two images.
    """
    seeds, images = gains.shape
    mean, of_seeds, of_images = gains.mean(), gains.mean(1), gains.mean(0)
    both = gains - of_seeds[:, None] - of_images + mean
    rest = both.square().sum() / ((seeds - 1) * (images - 1))
    seeds_error = math.sqrt(of_seeds.var() / seeds)
    images_error = math.sqrt(max(of_images.var() - rest / seeds, 0.0) / images)

    def margin(alpha: float) -> float:
        return math.hypot(stdtrit(seeds - 1, alpha / 2) * seeds_error, ndtri(alpha / 2) * images_error)

    gain, half = mean.item(), margin(ALPHA)
    return gain - half, gain + half, _p_value(margin, abs(gain))


def _p_value(margin: Callable[[float], float], gain: float) -> float:
    """The error probability at which an interval of `gain` with this margin ends at zero."""
    if gain <= margin(1.0):
        return 1.0
    if gain >= margin(SMALLEST_P):
        return 0.0
    return math.exp(brentq(lambda log_p: margin(math.exp(log_p)) - gain, math.log(SMALLEST_P), 0.0))


def _rounded(low: float, high: float, p_value: float) -> dict[str, float]:
    return {"ci_low": round(low, 4), "ci_high": round(high, 4), "p_value": float(f"{p_value:.4g}")}
