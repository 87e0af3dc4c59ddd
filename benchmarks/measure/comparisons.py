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
from benchmarks.measure.intervals import figures_over_seeds
from benchmarks.measure.protocol import LowBitNetwork
from benchmarks.runs.row_files import change


@dataclass(frozen=True, kw_only=True)
class Comparison(LowBitNetwork):
    """A line of `comparisons.csv`: one correction of one low-bit network; accuracies in percent, deltas in points.

    `won` and `lost` count the test images that became right and wrong. See `figures_over_seeds` for intervals and
    p-values: those of this network, and those over seeds, which of one seed are the same.
    """

    seed: int
    mode: str
    n_eval: int
    lq_top1: float
    top1: float
    delta: float
    networks_ci_low: float
    networks_ci_high: float
    networks_p_value: float
    seeds_ci_low: float
    seeds_ci_high: float
    seeds_p_value: float
    won: int
    lost: int


@dataclass(frozen=True, kw_only=True)
class Summary(LowBitNetwork):
    """A line of `summary.csv`: means over `seeds` and, from two seeds on, their standard deviations `*_std`.

    `won` and `lost` count the test images that more seeds put right than wrong, and the reverse. See
    `figures_over_seeds` for intervals and p-values: of these networks, on new images, and over seeds, on new images and
    with new seeds.
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
    networks_ci_low: float
    networks_ci_high: float
    networks_p_value: float
    seeds_ci_low: float
    seeds_ci_high: float
    seeds_p_value: float
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
            delta=_mean(_points(_changes([measurement], mode))),
            **figures_over_seeds(_changes([measurement], mode)),
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
            **_over_seeds("delta", "delta_std", _points(_changes(group, mode))),
            **figures_over_seeds(_changes(group, mode)),
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


def over_seeds(measured: Sequence[Measurement]) -> Iterator[list[Measurement]]:
    """The seeds of every method and bit setting."""
    for setting in dict.fromkeys(each.row.setting for each in measured):
        yield [each for each in measured if each.row.setting == setting]


def _network(row: Row) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(LowBitNetwork)}


def _changes(group: Sequence[Measurement], mode: str) -> Tensor:
    """`(seeds, n_eval)`, see `change`."""
    return torch.stack([change(each.predictions, mode) for each in group])


def _points(changes: Tensor) -> list[float]:
    """The gain of every seed in percentage points."""
    return (100.0 * changes.mean(1)).tolist()


def _mean(values: Sequence[float]) -> float:
    return round(statistics.fmean(values), 4)


def _over_seeds(mean: str, std: str, values: Sequence[float]) -> dict[str, float | None]:
    return {mean: _mean(values), std: round(statistics.stdev(values), 4) if len(values) > 1 else None}
