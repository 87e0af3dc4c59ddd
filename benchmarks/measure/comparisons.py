"""Every correction against its low-bit network on the same test images, seed by seed and over seeds."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.accuracy import Measurement, Row
from benchmarks.measure.corrections import MODES
from benchmarks.measure.protocol import LowBitNetwork
from benchmarks.runs.row_files import change
from cat_plugin.metrics import bootstrap_interval, paired_statistics


@dataclass(frozen=True, kw_only=True)
class Comparison(LowBitNetwork):
    """A line of `comparisons.csv`: one correction of one low-bit network; accuracies in percent, deltas in points.

    `ci_low` to `ci_high` is the 95 % paired bootstrap interval of `delta` over test images, `p_value` that of
    McNemar's exact test; `won` and `lost` count the test images that became right and wrong.
    """

    seed: int
    mode: str
    n_eval: int
    lq_top1: float
    top1: float
    delta: float
    ci_low: float
    ci_high: float
    p_value: float
    won: int
    lost: int


@dataclass(frozen=True, kw_only=True)
class Summary(LowBitNetwork):
    """A line of `summary.csv`: means over `seeds` and, from two seeds on, their standard deviations `*_std`.

    The interval is a paired bootstrap over test images, of each image's mean over the seeds. `won` and `lost` count
    the test images that more seeds put right than wrong, and the reverse; `p_value` is that of the exact sign test
    on these, which for one seed is McNemar's.
    """

    seeds: int
    mode: str
    n_eval: int
    fp_top1: float
    fp_std: float | None
    lq_top1: float
    lq_std: float | None
    top1: float
    top1_std: float | None
    delta: float
    delta_std: float | None
    ci_low: float
    ci_high: float
    p_value: float
    won: int
    lost: int


def compare(measured: Iterable[Measurement]) -> list[Comparison]:
    """One line a measurement and correction."""
    return [
        Comparison(
            **_network(measurement.row),
            seed=measurement.row.seed,
            mode=mode,
            n_eval=measurement.row.n_eval,
            lq_top1=measurement.row.lq_top1,
            top1=getattr(measurement.row, f"{mode}_top1"),
            delta=_mean(_points([measurement], mode)),
            **paired_figures(_difference([measurement], mode)),
        )
        for measurement in measured
        for mode in modes_of([measurement])
    ]


def summarize(measured: Sequence[Measurement]) -> list[Summary]:
    """One line a method, bit setting and correction, in the order in which they first come."""
    return [
        Summary(
            **_network(group[0].row),
            seeds=len(group),
            mode=mode,
            n_eval=group[0].row.n_eval,
            **_over_seeds("fp_top1", "fp_std", [each.row.fp_top1 for each in group]),
            **_over_seeds("lq_top1", "lq_std", [each.row.lq_top1 for each in group]),
            **_over_seeds("top1", "top1_std", [getattr(each.row, f"{mode}_top1") for each in group]),
            **_over_seeds("delta", "delta_std", _points(group, mode)),
            **paired_figures(_difference(group, mode)),
        )
        for group in over_seeds(measured)
        for mode in modes_of(group)
    ]


def by_setting(measured: Sequence[Measurement]) -> list[dict[str, Summary]]:
    """The summaries of every method and bit setting, by correction."""
    groups = groupby(summarize(measured), key=lambda line: line.setting)
    return [{line.mode: line for line in group} for _, group in groups]


def modes_of(measured: Sequence[Measurement]) -> list[str]:
    """The corrections that all of the measurements have."""
    return [mode for mode in MODES if all(mode in each.predictions for each in measured)]


def modes_in(measured: Sequence[Measurement]) -> list[str]:
    """The corrections that any of the measurements has."""
    return [mode for mode in MODES if any(mode in each.predictions for each in measured)]


def paired_figures(difference: Tensor) -> dict[str, float | int]:
    """Interval, p-value, won and lost of the gains of images `(n_eval,)`, each the mean over seeds, from -1 to 1."""
    paired = paired_statistics(difference < 0, difference > 0)
    low, high = bootstrap_interval(100.0 * difference)
    return {
        "ci_low": round(low, 4),
        "ci_high": round(high, 4),
        "p_value": float(f"{paired.p_value:.4g}"),
        "won": paired.won,
        "lost": paired.lost,
    }


def over_seeds(measured: Sequence[Measurement]) -> Iterator[list[Measurement]]:
    """The seeds of every method and bit setting."""
    for setting in dict.fromkeys(each.row.setting for each in measured):
        yield [each for each in measured if each.row.setting == setting]


def _network(row: Row) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(LowBitNetwork)}


def _difference(group: Sequence[Measurement], mode: str) -> Tensor:
    """`(n_eval,)` float64: how often an image became right less how often it became wrong, a seed."""
    return torch.stack([change(each.predictions, mode) for each in group]).mean(0)


def _points(group: Sequence[Measurement], mode: str) -> list[float]:
    """The gain of every seed in percentage points."""
    return [100.0 * _difference([each], mode).mean().item() for each in group]


def _mean(values: Sequence[float]) -> float:
    return round(statistics.fmean(values), 4)


def _over_seeds(mean: str, std: str, values: Sequence[float]) -> dict[str, float | None]:
    return {mean: _mean(values), std: round(statistics.stdev(values), 4) if len(values) > 1 else None}
