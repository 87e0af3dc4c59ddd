"""A run of `compare` as CSV, JSON and a Markdown table with means and standard deviations over seeds."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from baselines.recipes import RECIPES
from benchmarks.measure.accuracy import Measurement, Row
from benchmarks.measure.comparisons import Summary, by_setting, compare, modes_in, over_seeds, summarize
from benchmarks.measure.corrections import MODES, PAPER_CLUSTERS
from benchmarks.reports import published
from benchmarks.reports.cost_report import write_costs
from benchmarks.reports.tables import markdown_table, to_csv, write_texts
from benchmarks.wording import bits_name, signed, spread


def write_report(folder: Path, measured: Sequence[Measurement], weights: str | None = None) -> dict[str, bool]:
    """Write all tables, each whole or not at all; which files there are, and whether each was there just the same.

    `results.csv` has a line a network, `comparisons.csv` one a network and correction, `summary.csv` one a
    method, bit setting and correction, over seeds; `results.json` holds all three, `results.md` the table to read,
    whose title says which full-precision `weights` there were. For `costs.*`, see `write_costs`.
    """
    parts = {
        "results": [measurement.row for measurement in measured],
        "comparisons": compare(measured),
        "summary": summarize(measured),
    }
    texts = {f"{name}.csv": to_csv(lines) for name, lines in parts.items() if lines}
    plain = {name: [asdict(line) for line in lines] for name, lines in parts.items()}
    texts["results.json"] = json.dumps(plain, indent=2) + "\n"
    texts["results.md"] = to_markdown(measured, weights) + "\n"
    return write_texts(folder, texts) | write_costs(folder, measured)


def to_markdown(measured: Sequence[Measurement], weights: str | None = None) -> str:
    """Title and table; then the published figures for the same networks, where there are some."""
    found = published.beside(measured)
    table = ["Beside published figures:", markdown_table(found.lines)] if found and found.lines else []
    parts = [title([measurement.row for measurement in measured], weights), to_table(measured), *top5(measured), *table]
    return "\n\n".join([*parts, found.notes] if found else parts)


def conditions(rows: Sequence[Row]) -> tuple[object, ...]:
    """All that rows of one table have in common."""
    first, seeds = rows[0], sorted({row.seed for row in rows})
    counts = first.n_eval, first.n_calib, first.n_cat, max(row.reused_images for row in rows), first.iters
    return first.dataset, first.model, *counts, first.test_folds, *seeds


def title(rows: Sequence[Row], weights: str | None = None) -> str:
    """One sentence that says what the table shows; `weights` are those of the full-precision network."""
    first, seeds = rows[0], sorted({row.seed for row in rows})
    others = f"{first.n_cat:,} others for the corrections"
    if reused := max(row.reused_images for row in rows):
        others = f"{first.n_cat:,} for the corrections, up to {reused:,} of them the same"
    if first.test_folds > 1:
        others = f"corrections fitted on {first.n_cat:,} images of one half of the test images and tested on the other"
        others += ", in turn"
    learned = any(RECIPES[row.method].stages for row in rows)
    few = "" if first.n_cat >= PAPER_CLUSTERS else f" The published recipe takes at least {PAPER_CLUSTERS} images."
    return (
        f"Top-1 in percent on {first.n_eval:,} test images: {first.model} on {first.dataset}, "
        f"{'' if weights is None else f'full-precision weights: {weights}, '}"
        f"{first.n_calib:,} images for quantization, {others}, "
        f"{f'{first.iters:,} iterations a unit, ' if learned else ''}"
        f"{'seed' if len(seeds) == 1 else 'mean ± standard deviation of seeds'} {', '.join(map(str, seeds))}.{few}"
    )


def to_table(measured: Sequence[Measurement]) -> str:
    """Markdown table, padded so that it also reads well on a console; one line a method and bit setting.

    Gain, interval and p are those of the library's default, or of the last correction where that is not there. Where
    there are several seeds, they are given over seeds and of these networks, see `figures_over_seeds`.
    """
    modes = modes_in(measured)
    several = len({each.row.seed for each in measured}) > 1
    kinds = {"seeds": " over seeds", "networks": " of these networks"} if several else {"networks": ""}
    worth = [f"{figure}{kind}" for kind in kinds.values() for figure in ("95 % interval", "p")]
    shown = [f"gain of {MODES[modes[-1]]}", *worth]
    lines = [("method", "bits", "FP", "low-bit", *(f"+ {MODES[mode]}" for mode in modes), *shown)]
    for found in by_setting(measured):
        any_line, last = next(iter(found.values())), found.get(modes[-1])
        scores = [
            spread(any_line.fp_top1, any_line.fp_std),
            spread(any_line.lq_top1, any_line.lq_std),
            *(spread(found[mode].top1, found[mode].top1_std) if mode in found else "-" for mode in modes),
        ]
        gain = ["-"] * len(shown) if last is None else _gain(last, kinds)
        lines.append((any_line.method, bits_name(any_line.w_bits, any_line.a_bits), *scores, *gain))
    return markdown_table(lines)


def top5(measured: Sequence[Measurement]) -> list[str]:
    """Heading and table of top-5, means over seeds, of the networks whose ranks are stored; [] where there are none."""
    ranked = [group for group in over_seeds(measured) if all(each.row.lq_top5 is not None for each in group)]
    if not ranked:
        return []
    modes = modes_in(measured)
    lines = [("method", "bits", "FP", "low-bit", *(f"+ {MODES[mode]}" for mode in modes))]
    for group in ranked:
        row = group[0].row
        scores = ([getattr(each.row, f"{name}_top5") for each in group] for name in ("fp", "lq", *modes))
        texts = ("-" if None in each else f"{statistics.fmean(each):.2f}" for each in scores)
        lines.append((row.method, bits_name(row.w_bits, row.a_bits), *texts))
    return ["Top-5 in percent:", markdown_table(lines)]


def _gain(line: Summary, kinds: Iterable[str]) -> list[str]:
    """Gain, and of every kind interval and p."""
    texts = [spread(line.delta, line.delta_std, sign="+")]
    for kind in kinds:
        low, high, p_value = (getattr(line, f"{kind}_{name}") for name in ("ci_low", "ci_high", "p_value"))
        texts += [f"{signed(low)} to {signed(high)}", readable_p(p_value)]
    return texts


def readable_p(p_value: float) -> str:
    """Three decimals."""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
