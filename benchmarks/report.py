"""Rows as CSV, JSON and a Markdown table with means and standard deviations over seeds."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.evaluate import Measurement, Row
from benchmarks.files import write_text
from cat_plugin.metrics import bootstrap_interval

HEADER = ("method", "bits", "FP", "low-bit", "+ plain affine", "+ CAT (paper)", "+ CAT", "gain of CAT", "95 % interval")
SCORES = ("fp_top1", "lq_top1", "plain_affine_top1", "cat_paper_top1", "cat_top1")


def write_report(folder: Path, measured: Sequence[Measurement]) -> None:
    """Write ``results.csv``, ``results.json`` and ``results.md``, each whole or not at all."""
    rows = [measurement.row for measurement in measured]
    write_text(folder / "results.csv", to_csv(rows))
    write_text(folder / "results.json", json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    write_text(folder / "results.md", to_markdown(measured) + "\n")


def write_environment(folder: Path, environment: dict[str, Any]) -> None:
    """Write ``environment.json``; where there is one, it stays that of the first call but for ``seconds``."""
    path = folder / "environment.json"
    try:
        first = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        first = {}
    kept = {**environment, **first, "seconds": environment["seconds"]}
    write_text(path, json.dumps(kept, indent=2) + "\n")


def to_csv(rows: Sequence[Any]) -> str:
    """One line for each of the dataclass instances, all of one type; empty where a value is None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def to_markdown(measured: Sequence[Measurement]) -> str:
    """Title and table."""
    return f"{title([measurement.row for measurement in measured])}\n\n{to_table(measured)}"


def title(rows: Sequence[Row]) -> str:
    """One sentence that says what the table shows."""
    first, seeds = rows[0], sorted({row.seed for row in rows})
    return (
        f"Top-1 in percent on {first.n_eval:,} test images: {first.model} on {first.dataset}, "
        f"{first.n_calib:,} images for quantization, {first.n_cat:,} others for the corrections, "
        f"{first.iters:,} iterations a unit, {'seed' if len(seeds) == 1 else 'mean ± standard deviation of seeds'} "
        f"{', '.join(map(str, seeds))}."
    )


def to_table(measured: Sequence[Measurement]) -> str:
    """Markdown table, padded so that it also reads well on a console; one line a method and bit setting.

    The interval of the gain is a paired bootstrap over test images, of each image's mean over the seeds.
    """

    def cell(measurement: Measurement) -> tuple[str, int, int]:
        return measurement.row.method, measurement.row.w_bits, measurement.row.a_bits

    order = list(dict.fromkeys(map(cell, measured)))
    lines = [HEADER]
    for (method, w_bits, a_bits), group in groupby(sorted(measured, key=lambda m: order.index(cell(m))), key=cell):
        seeds = list(group)
        scores = [_over_seeds([getattr(seed.row, score) for seed in seeds]) for score in SCORES]
        gain = _over_seeds([seed.row.cat_delta for seed in seeds], sign="+")
        low, high = bootstrap_interval(100 * torch.stack([seed.gain() for seed in seeds]).mean(0))
        lines.append((method, f"W{w_bits}A{a_bits}", *scores, gain, f"{low:+.2f} to {high:+.2f}"))
    return align(lines)


def _over_seeds(values: Sequence[float | None], sign: str = "") -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):{sign}.2f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.2f}"


def align(lines: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table, padded; the first line is the header; two columns of text, then figures, to the right."""
    widths = [max(len(text) for text in column) for column in zip(*lines, strict=True)]
    rule = [("-" * width) if index < 2 else "-" * (width - 1) + ":" for index, width in enumerate(widths)]

    def joined(cells: Sequence[str]) -> str:
        padded = [
            text.ljust(width) if index < 2 else text.rjust(width)
            for index, (text, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    return "\n".join([joined(lines[0]), joined(rule), *(joined(line) for line in lines[1:])])
