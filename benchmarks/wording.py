"""How figures, settings, names and errors are written in tables, titles and messages alike."""

import re
from collections.abc import Iterable


def signed(points: float) -> str:
    """A gain with its sign; never "-0.00"."""
    return f"{round(points, 2) + 0.0:+.2f}"


def spread(mean: float, std: float | None, sign: str = "") -> str:
    """`mean ± std`, the latter where it is known."""
    return f"{mean:{sign}.2f}" if std is None else f"{mean:{sign}.2f} ± {std:.2f}"


def bits_name(w_bits: int, a_bits: int) -> str:
    """Such as `W2A4`."""
    return f"W{w_bits}A{a_bits}"


def some(names: Iterable[object], most: int) -> str:
    """The first `most` of the names, and how many more there are."""
    shown = list(map(str, names))
    more = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {more:,} more" if more > 0 else "")


def counted(number: int, noun: str) -> str:
    """Such as `1 image` and `1,300 images`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def did_you_mean(names: Iterable[str]) -> str:
    """The question, of names that are like what was given."""
    return f"did you mean {' or '.join(names)}?"


def reason(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def file_name(name: str) -> str:
    """A name as part of that of a file: `timm/resnet18` is `timm-resnet18`."""
    return name.replace("/", "-")


def lasting(described: object) -> str:
    """What an object says of itself in one process as in the next: without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(described))
