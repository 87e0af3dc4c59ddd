"""Every factor of an ablation as CSV, as Markdown tables and as a figure, with what the authors of CAT published."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.anchors import CURVES, SOURCE, Anchor, load_anchors
from benchmarks.measure.corrections import MODES
from benchmarks.measure.draws import Gain
from benchmarks.measure.factors import FACTORS, Value
from benchmarks.reports.plots import COLOURS, GAIN_LABEL, MARKERS, gain_axis, new_figure
from benchmarks.reports.robustness_report import gains_table, mean_gain
from benchmarks.reports.tables import markdown_table, to_csv, write_texts
from benchmarks.wording import bits_name, signed
from cat_plugin.report.figures import plain_style, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class Line(Gain):
    """A line of `<factor>.csv`: a gain, and the value of the factor that it stands for."""

    factor: str
    value: Value


def write_report(folder: Path, lines: Sequence[Line], notes: Sequence[str]) -> dict[str, bool]:
    """Write `<factor>.csv`, `<factor>.md` and, where matplotlib is installed, `<factor>.png` of every factor.

    Each is written whole or not at all. Gives the files there are, and whether each was there just the same.
    """
    files: dict[str, bool] = {}
    for factor, found in _by_factor(lines).items():
        text = "\n\n".join([factor_markdown(factor, found), *notes])
        files |= write_texts(folder, {f"{factor}.csv": to_csv(found), f"{factor}.md": text + "\n"})
        files |= {f"{factor}.png": False} if plot(factor, found, folder / f"{factor}.png") else {}
    return files


def to_markdown(lines: Sequence[Line], notes: Sequence[str]) -> str:
    """The tables of all factors, and `notes` on what is not in them."""
    return "\n\n".join([*(factor_markdown(*each) for each in _by_factor(lines).items()), *notes])


def factor_markdown(factor: str, lines: Sequence[Line]) -> str:
    """What one factor does: over all sources and draws, in each source, and as published."""
    known = FACTORS[factor]
    centre = "the default" if known.of_layers else "paper mode (K = 64, alpha = 0.4) and in the default for outputs"
    title = f"{known.label}: gain in top-1 over the low-bit model, in percentage points; all else as in {centre}."
    groups = {
        (_readable(value), MODES[mode]): [line.gain for line in lines if (line.value, line.mode) == (value, mode)]
        for value in _values(lines)
        for mode in known.modes
    }
    parts = [title, gains_table(factor, groups), "Mean gain of each source:", sources_table(lines)]
    anchors = load_anchors(factor)
    if anchors:
        parts += [f"For comparison, {SOURCE}; {CURVES[factor][2]}; mean gains over seeds:", anchors_table(anchors)]
    return "\n\n".join(parts)


def sources_table(lines: Sequence[Line]) -> str:
    """One line a source and mode, with the mean gain at every value over the draws."""
    values = _values(lines)
    table = [("source", "correction", "low-bit", *map(_readable, values))]
    for source in dict.fromkeys(line.source for line in lines):
        for mode in MODES:
            found = [line for line in lines if (line.source, line.mode) == (source, mode)]
            if found:
                means = [mean_gain(line.gain for line in found if line.value == value) for value in values]
                table.append((source, MODES[mode], f"{found[0].lq_top1:.2f}", *means))
    return markdown_table(table)


def anchors_table(anchors: Sequence[Anchor]) -> str:
    """One line a network and bit setting, with the mean gain at every value over seeds."""
    values = sorted({anchor.value for anchor in anchors})
    table = [("network", "bits", *map(_readable, values))]
    for (arch, bits), curve in _curves(anchors).items():
        table.append((arch, bits, *(signed(curve[value]) if value in curve else "-" for value in values)))
    return markdown_table(table)


@plain_style()
def plot(factor: str, lines: Sequence[Line], path: Path) -> bool:
    """Draw gains against values: a panel a mode, with a thin line a source and a thick one for their mean, and a panel
    for what was published; False without matplotlib."""
    modes = [mode for mode in FACTORS[factor].modes if any(line.mode == mode for line in lines)]
    anchors = load_anchors(factor)
    drawing = new_figure(path.name, len(modes) + bool(anchors))
    if drawing is None:
        return False
    figure, panels = drawing
    for panel, mode in zip(panels, modes, strict=False):
        _draw_sources(panel, factor, [line for line in lines if line.mode == mode])
        panel.set_title(f"{MODES[mode]}, here", fontsize="medium")
    if anchors:
        _draw_anchors(panels[-1], anchors)
        panels[-1].set_title(f"authors: ImageNet, PD-Quant\n({CURVES[factor][2]})", fontsize="medium")
    for panel in panels:
        gain_axis(panel)
        panel.set_xlabel(FACTORS[factor].label, fontsize="small")
        if FACTORS[factor].scale == "log":
            panel.set_xscale("log", base=2 if not anchors or factor != "images" else 10)
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panels[0].set_ylabel(GAIN_LABEL)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="x-small", frameon=False)
    save_figure(figure, path)
    return True


def _draw_sources(panel: "Axes", factor: str, lines: Sequence[Line]) -> None:
    values = _values(lines)
    named = FACTORS[factor].scale == "names"
    places = list(range(len(values))) if named else values
    if named:
        panel.set_xticks(places, list(map(_readable, values)))
    sources = list(dict.fromkeys(line.source for line in lines))
    for index, source in enumerate(sources):
        found = [line for line in lines if line.source == source]
        means = [_mean(line.gain for line in found if line.value == value) for value in values]
        few = len(sources) <= len(COLOURS)
        style = {"color": COLOURS[index], "marker": MARKERS[index], "label": source} if few else {"color": "grey"}
        panel.plot(places, means, linewidth=1, markersize=4, **style)
    means = [_mean(line.gain for line in lines if line.value == value) for value in values]
    panel.plot(places, means, color="black", linewidth=2.5, label="mean over draws of all sources")


def _draw_anchors(panel: "Axes", anchors: Sequence[Anchor]) -> None:
    curves = _curves(anchors)
    widths = sorted({bits for _, bits in curves})
    for (_, bits), curve in curves.items():
        index = widths.index(bits)
        (line,) = panel.plot(list(curve), list(curve.values()), linewidth=1, markersize=4, label=f"_{bits}")
        line.set(color=COLOURS[index], marker=MARKERS[index])
    for index, bits in enumerate(widths):
        panel.plot([], [], linewidth=1, markersize=4, color=COLOURS[index], marker=MARKERS[index], label=bits)
    panel.legend(fontsize="x-small", frameon=False)


def _curves(anchors: Sequence[Anchor]) -> dict[tuple[str, str], dict[float, float]]:
    """Mean gain over seeds by value, for every network and bit setting."""
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for anchor in sorted(anchors, key=lambda each: each.value):
        curve = found.setdefault((anchor.arch, bits_name(anchor.w_bits, anchor.a_bits)), {})
        curve.setdefault(anchor.value, []).append(anchor.gain)
    return {key: {value: statistics.fmean(gains) for value, gains in found[key].items()} for key in sorted(found)}


def _by_factor(lines: Sequence[Line]) -> dict[str, list[Line]]:
    return {name: found for name in FACTORS if (found := [line for line in lines if line.factor == name])}


def _values(lines: Sequence[Line]) -> list[Value]:
    """In the order of the run, which is that of the command line."""
    return list(dict.fromkeys(line.value for line in lines))


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return statistics.fmean(known) if known else float("nan")


def _readable(value: Value) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"
