"""What the options of several commands have in common: types of values, groups, and what data sets mean for them."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from baselines import METHODS
from baselines.api import CACHE_DEVICES
from benchmarks.measure.factors import FACTORS, Value
from benchmarks.networks.pretrained import TIMM, TIMM_FAMILIES, TORCHVISION
from benchmarks.runs.processes import this_process, use_device

METHODS_BY_DEFAULT = "rtn", "qdrop"
BITS = "2/2", "2/4", "4/2", "4/4"
FLOAT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a data set means for options that are not given; the first of its models is the default one."""

    models: tuple[str, ...]
    iters: int
    n_calib: int
    n_cat: int
    features: dict[str, str]  # the last layer of each model that a correction may take features from
    trains: bool  # whether a network is trained where no weights are given


DATASETS = {
    "digits": Defaults(
        models=("resnet8",), iters=250, n_calib=256, n_cat=1024, features={"resnet8": "layer3"}, trains=True
    ),
    "cifar10": Defaults(
        models=("resnet20", "mobilenetv2"),
        iters=1000,
        n_calib=1024,
        n_cat=1024,
        features={"resnet20": "layer3", "mobilenetv2": "features"},
        trains=False,
    ),
    "imagenet": Defaults(
        models=(*TORCHVISION, *TIMM), iters=20_000, n_calib=1024, n_cat=1024, features=TORCHVISION | TIMM, trains=False
    ),
}


def add_network_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        type=Path,
        metavar="ZIP_OR_FOLDER",
        help="train/<class>/* and test/<class>/*, for imagenet a folder with val/<class>/*; default: download CIFAR-10",
    )
    group.add_argument("--model", type=network, metavar="NAME", help=", ".join(models()))
    group.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="state_dict of the full-precision network; for imagenet also the name of published weights, such as "
        "IMAGENET1K_V1 (default: DEFAULT)",
    )
    group.add_argument(
        "--fp-top1", type=percent, metavar="PERCENT", help="imagenet: expected of the full-precision network"
    )
    group.add_argument("--workers", type=natural, metavar="N", help="imagenet: processes that decode images")
    group.add_argument(
        "--methods", nargs="+", choices=METHODS, help=f"of quantization (default: {' '.join(METHODS_BY_DEFAULT)})"
    )
    group.add_argument(
        "--bits", nargs="+", type=bits, metavar="W/A", default=[bits(each) for each in BITS], help=" ".join(BITS)
    )
    group.add_argument("--seeds", nargs="+", type=seed, metavar="SEED", default=[0])


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Paired logits to fit corrections on: from files, and of networks that are quantized here."""
    files = parser.add_argument_group("files of logits")
    files.add_argument(
        "--logits",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="folders of *.npz files with q_calib, f_calib, q_test, f_test and y_test",
    )
    files.add_argument(
        "--skip", type=natural, default=1024, metavar="ROWS", help="first ones, tuned on, left out (default: 1024)"
    )

    what = parser.add_argument_group("networks to quantize")
    what.add_argument("--dataset", choices=DATASETS, help="default: digits where there are no --logits")
    add_network_options(what)
    what.add_argument("--iters", type=positive, help="iterations for each unit of the network")
    add_quantization_options(what)


def add_quantization_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--n-calib", type=positive, help="training images for quantization")
    group.add_argument("--batch-size", type=positive, default=32, help="of the reconstruction (default: 32)")
    group.add_argument("--device", type=device, default="cpu", help="where the networks run (default: cpu)")
    group.add_argument(
        "--cache-device",
        choices=CACHE_DEVICES,
        default="model",
        help="where inputs and outputs of units are kept: with the model, or on the cpu (default: model)",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where")
    where.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    where.add_argument("--run", metavar="NAME", help="folder in DIR; default: derived from the settings")
    where.add_argument("--cache", type=Path, default=cache(), metavar="DIR", help="trained networks and downloads")
    where.add_argument("--fresh", action="store_true", help="measure again what the run has finished")
    where.add_argument("--no-progress", action="store_true", help="no progress bars")


def models() -> list[str]:
    return [model for each in DATASETS.values() for model in each.models]


def cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "cat-plugin"


def network(text: str) -> str:
    if text not in models() and not text.startswith(TIMM_FAMILIES):
        raise argparse.ArgumentTypeError(f"{text!r} should be one of {', '.join(models())}, or one of timm's")
    return text


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
    """``NAME`` or ``NAME=VALUE,VALUE...``: a factor of ``ablate`` and its values."""
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
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from None
    return text
