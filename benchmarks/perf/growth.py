"""How the cost of fit, selection and application grows with images, classes and clusters, one of them at a time."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.reports.tables import markdown_table, to_csv, write_texts

AXES: dict[str, tuple[int, ...]] = {
    "images": (1024, 4096, 16384, 65536),
    "classes": (10, 100, 1000),
    "clusters": (1, 8, 64, 256),
}
READS = {"copy": 1, "apply": 1, "fit": 2, "selection": 2}
"""What is timed, and how many tensors of logits it reads, a plain copy of which is its limit."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of logits (images, classes), and of a correction."""

    images: int = 4096
    classes: int = 100
    clusters: int = 64

    def __str__(self) -> str:
        return f"N={self.images},C={self.classes},K={self.clusters}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of `growth.csv`: one call, of a size that differs from the others of its axis in the value alone.

    `us_per_row` is microseconds an image; `copies` how many plain copies of the logits that it reads take as long;
    `exponent` that of the operation along the axis, the same in all its lines.
    """

    axis: str
    value: int
    operation: str
    images: int
    classes: int
    clusters: int
    seconds: float
    us_per_row: float
    copies: float
    exponent: float


Seconds = Mapping[tuple[str, Size], float]


def along(axis: str) -> list[Size]:
    """The sizes of an axis."""
    return [Size(**{axis: value}) for value in AXES[axis]]


def sizes() -> list[Size]:
    """All sizes, each once."""
    return list(dict.fromkeys(size for axis in AXES for size in along(axis)))


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log(seconds) against log(values), by least squares: b where seconds = a * value ** b.

    Raises:
        ValueError: fewer than two different values, or a figure that is not positive.
    """
    if len(set(values)) < 2 or len(values) != len(seconds) or min(*values, *seconds) <= 0:
        raise ValueError(f"got values {list(values)} and seconds {list(seconds)}; expected positive ones, two or more")
    return statistics.linear_regression([*map(math.log, values)], [*map(math.log, seconds)]).slope


def lines(seconds: Seconds) -> list[Line]:
    """Axis by axis, from the seconds of all operations at all `sizes`."""
    found = []
    for axis, values in AXES.items():
        for operation, reads in READS.items():
            taken = [seconds[operation, size] for size in along(axis)]
            slope = exponent(values, taken)
            for size, value, time in zip(along(axis), values, taken, strict=True):
                figures = {"seconds": time, "us_per_row": 1e6 * time / size.images, "exponent": slope}
                copies = time / (reads * seconds["copy", size])
                found.append(
                    Line(axis=axis, value=value, operation=operation, **asdict(size), copies=copies, **figures)
                )
    return found


def to_markdown(found: Sequence[Line]) -> str:
    """A table an axis, and one of the exponents."""
    parts = [_table(axis, [line for line in found if line.axis == axis]) for axis in AXES]
    slopes = {(line.operation, line.axis): f"{round(line.exponent, 2) + 0.0:.2f}" for line in found}
    rows = [(operation, "", *(slopes[operation, axis] for axis in AXES)) for operation in READS]
    parts += ["Growth exponents: b where time goes as a power b.", markdown_table([("", "", *AXES), *rows])]
    return "\n\n".join(parts)


def _table(axis: str, found: Sequence[Line]) -> str:
    fixed = ", ".join(f"{value:,} {name}" for name, value in asdict(Size()).items() if name != axis)
    table = [("operation", "figure", *(f"{value:,}" for value in AXES[axis]))]
    for operation in READS:
        own = [line for line in found if line.operation == operation]
        table.append((operation, "ms a call", *(_short(1e3 * line.seconds) for line in own)))
        table.append((operation, "us a row", *(_short(line.us_per_row) for line in own)))
        if operation != "copy":
            table.append((operation, "plain copies", *(_short(line.copies) for line in own)))
    return f"By number of {axis}, at {fixed}, processor time on one thread:\n\n{markdown_table(table)}"


def _short(figure: float) -> str:
    """Three digits."""
    decimals = max(2 - math.floor(math.log10(figure)), 0)
    return f"{figure:,.{min(decimals, 4)}f}"


def write_growth(folder: Path, found: Sequence[Line]) -> str:
    """Write `growth.md` and `growth.csv`, each whole or not at all, and give the text of the former."""
    text = to_markdown(found)
    write_texts(folder, {"growth.md": text + "\n", "growth.csv": to_csv(found)})
    return text
