"""Types of the values of options: what a text on the command line stands for, or why it is refused."""

import argparse
from difflib import get_close_matches

import torch

from benchmarks.measure.factors import FACTORS, Value
from benchmarks.networks.catalogue import ALL_NETWORKS, PREFIXES, TIMM_FAMILIES, one_name
from benchmarks.networks.weights_and_transforms import names_in_libraries
from benchmarks.runs.processes import this_process, use_device
from benchmarks.wording import did_you_mean, reason

FLOAT_BITS = 32


def network(text: str) -> str:
    if text not in ALL_NETWORKS and not text.startswith((*PREFIXES, *TIMM_FAMILIES)):
        others = " or ".join(f"{prefix}NAME" for prefix in PREFIXES)
        alike = names_in_libraries(text) or get_close_matches(text, ALL_NETWORKS, 1)
        advice = f"; {did_you_mean(alike)}" if alike else ""
        raise argparse.ArgumentTypeError(
            f"{text!r} should be one of {', '.join(ALL_NETWORKS)}, or for imagenet {others}{advice}"
        )
    return one_name(text)


def percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} should be a number from 0 to 100")
    return value


def bits(text: str) -> tuple[int, int]:
    try:
        w_bits, a_bits = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should be WEIGHT_BITS/ACTIVATION_BITS such as 2/4") from None
    if not _possible(w_bits, a_bits):
        raise argparse.ArgumentTypeError(f"{text!r}: bits should be 2 to 8, or {FLOAT_BITS} for floating point")
    return w_bits, a_bits


def one_width(text: str) -> int:
    bits = _whole_number(text, 2, FLOAT_BITS)
    if not _possible(bits):
        raise argparse.ArgumentTypeError(f"{text!r} should be 2 to 8, or {FLOAT_BITS} for floating point")
    return bits


def _possible(*bits: int) -> bool:
    return all(width == FLOAT_BITS or 2 <= width <= 8 for width in bits)


def positive(text: str) -> int:
    return _whole_number(text, 1)


def factor(text: str) -> tuple[str, tuple[Value, ...]]:
    """`NAME` or `NAME=VALUE,VALUE...`: a factor of `ablate` and its values."""
    name, _, listed = text.partition("=")
    if name not in FACTORS:
        raise argparse.ArgumentTypeError(f"{name!r} should be one of {', '.join(FACTORS)}")
    known = FACTORS[name]
    if not listed:
        return name, known.values
    try:
        values = tuple(dict.fromkeys(known.kind(value) for value in listed.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: values should be of type {known.kind.__name__}") from None
    if known.kind is str:
        possible = all(value in known.values for value in values)
        expected = f"among {', '.join(map(str, known.values))}"
    else:
        possible = all(known.least <= value <= known.most for value in values)
        expected = f"from {known.least:g}" + ("" if known.most == float("inf") else f" to {known.most:g}")
    if not possible:
        raise argparse.ArgumentTypeError(f"{text!r}: values should be {expected}")
    return name, values


def natural(text: str) -> int:
    return _whole_number(text, 0)


def seed(text: str) -> int:
    return _whole_number(text, 0, 2**32 - 1)  # what scikit-learn accepts


def _whole_number(text: str, low: int, high: int | None = None) -> int:
    number = int(text) if text.isascii() and text.isdigit() else -1
    if number < low or (high is not None and number > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number {limits}")
    return number


def device(text: str) -> str:
    try:
        use_device(text, this_process())
        # Has something computed and given back: the meta device would take tensors and hold none.
        ones = torch.ones(2, 2, device=text)
        (ones @ ones).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason(error)}") from None
    return text
