"""What quantization and corrections cost beside what they gain: as CSV, and as a Markdown table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure.accuracy import QUANTIZATION, Measurement
from benchmarks.measure.comparisons import modes_of
from benchmarks.measure.corrections import DEFAULT_MODE, MODES
from benchmarks.measure.protocol import LowBitNetwork
from benchmarks.reports.tables import markdown_table, to_csv, write_texts
from benchmarks.wording import bits_name, spread

PLAIN, BESIDE = "none", "rtn"
TITLE = (
    "Cost beside gain: seconds of quantization and of the correction, and top-1 in percent, of rounding to nearest "
    f"with {MODES[DEFAULT_MODE]} corrected and of every method without a correction. Seconds are the processor's, on "
    'an accelerator those of the clock; "-" where a network comes from a cache that does not tell.'
)


@dataclass(frozen=True, kw_only=True)
class Cost(LowBitNetwork):
    """A line of `costs.csv`: what it takes to get to `top1`, in seconds, which are None where they are unknown.

    `mode` is a correction, whose `correction_seconds` hold running both networks on its images, or `"none"`.
    """

    seed: int
    mode: str
    quantization_seconds: float | None
    correction_seconds: float | None
    top1: float

    @property
    def seconds(self) -> float | None:
        """Of both."""
        parts = self.quantization_seconds, self.correction_seconds
        return None if None in parts else sum(parts)


def write_costs(folder: Path, measured: Sequence[Measurement]) -> dict[str, bool]:
    """Write `costs.csv` and, where there is something to compare, `costs.md`; nothing where no seconds are known.

    Gives the files there are, and whether each was there just the same.
    """
    if not any(measurement.parts for measurement in measured):
        return {}
    text = to_markdown(measured)
    texts = {"costs.csv": to_csv(costs(measured))} | ({"costs.md": text + "\n"} if text else {})
    return write_texts(folder, texts)


def to_markdown(measured: Sequence[Measurement]) -> str:
    """The table with what it shows; empty where there is no rounding to nearest with corrected layers."""
    lines = cost_lines(costs(measured))
    return f"{TITLE}\n\n{markdown_table(lines)}" if lines else ""


def costs(measured: Sequence[Measurement]) -> list[Cost]:
    """One line a network, without a correction and with each."""
    return [
        Cost(
            **{name: getattr(each.row, name) for name in ("dataset", "model", "method", "w_bits", "a_bits", "seed")},
            mode=mode,
            quantization_seconds=each.parts.get(QUANTIZATION),
            correction_seconds=0.0 if mode == PLAIN else each.parts.get(mode),
            top1=each.row.lq_top1 if mode == PLAIN else getattr(each.row, f"{mode}_top1"),
        )
        for each in measured
        for mode in (PLAIN, *modes_of([each]))
    ]


def cost_lines(found: Sequence[Cost]) -> list[tuple[str, ...]]:
    """Header, and for every bit setting one line a method, and one of rounding to nearest with corrected layers."""
    shown = [cost for cost in found if cost.mode == PLAIN or (cost.method, cost.mode) == (BESIDE, DEFAULT_MODE)]
    corrected = {(cost.w_bits, cost.a_bits) for cost in shown if cost.mode == DEFAULT_MODE}
    lines = [("bits", "method", "quantization", "correction", "seconds", "top-1")]
    for bits in dict.fromkeys((cost.w_bits, cost.a_bits) for cost in shown):
        if bits not in corrected:
            continue
        alike = [cost for cost in shown if (cost.w_bits, cost.a_bits) == bits]
        for method, mode in dict.fromkeys((cost.method, cost.mode) for cost in alike):
            group = [cost for cost in alike if (cost.method, cost.mode) == (method, mode)]
            name = method if mode == PLAIN else f"{method} + {MODES[mode]}"
            parts = ([getattr(each, part) for each in group] for part in _PARTS)
            lines.append((bits_name(*bits), name, *map(_seconds, parts), _top1([each.top1 for each in group])))
    return lines if len(lines) > 1 else []


_PARTS = "quantization_seconds", "correction_seconds", "seconds"


def _seconds(values: Sequence[float | None]) -> str:
    """Mean over seeds."""
    return "-" if None in values else f"{statistics.fmean(values):,.1f}"


def _top1(values: Sequence[float]) -> str:
    return spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
