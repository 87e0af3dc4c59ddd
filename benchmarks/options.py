"""The options of the command line and what they mean where they are not given."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from baselines import METHODS
from baselines.api import CACHE_DEVICES
from benchmarks import BenchmarkError

BITS = "2/2", "2/4", "4/2", "4/4"
FLOAT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a data set means for options that are not given; the first of its models is the default one."""

    models: tuple[str, ...]
    iters: int
    n_calib: int
    n_cat: int
    trains: bool  # whether a network is trained where no weights are given


DATASETS = {
    "digits": Defaults(models=("resnet8",), iters=250, n_calib=256, n_cat=1024, trains=True),
    "cifar10": Defaults(models=("resnet20", "mobilenetv2"), iters=1000, n_calib=1024, n_cat=1024, trains=False),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The options with every default filled in.

    Raises:
        BenchmarkError: options that do not go together.
        SystemExit: options that argparse refuses by themselves; it has printed why.
    """
    args = _parser().parse_args(argv)
    defaults = DATASETS[args.dataset]
    for option in ("iters", "n_calib", "n_cat"):
        if getattr(args, option) is None:
            setattr(args, option, getattr(defaults, option))
    args.model = _model_for(args)
    if args.weights is None and not defaults.trains:
        raise BenchmarkError(
            f"--dataset {args.dataset} needs --weights FILE, a state_dict of {args.model} trained on these images: "
            "training it here would take hours; without --dataset a small network is trained on the digits"
        )
    _check_images(args)
    args.methods, args.bits, args.seeds = (list(dict.fromkeys(each)) for each in (args.methods, args.bits, args.seeds))
    return args


def parse_speed(argv: list[str]) -> argparse.Namespace:
    """The options of ``python -m benchmarks.speed`` with every default filled in.

    Raises:
        BenchmarkError: options that do not go together.
        SystemExit: options that argparse refuses by themselves; it has printed why.
    """
    args = _speed_parser().parse_args(argv)
    defaults = DATASETS[args.dataset]
    args.n_calib = args.n_calib or defaults.n_calib
    args.model = _model_for(args)
    _check_images(args)
    return args


def _model_for(args: argparse.Namespace) -> str:
    models = DATASETS[args.dataset].models
    model = args.model or models[0]
    if model not in models:
        raise BenchmarkError(f"--model {model} is not for {args.dataset}; choose from {', '.join(models)}")
    return model


def _check_images(args: argparse.Namespace) -> None:
    if args.data is not None and args.dataset == "digits":
        raise BenchmarkError("--data is not for digits, which come with scikit-learn; did you mean --dataset cifar10?")
    if args.n_calib < args.batch_size:
        raise BenchmarkError(f"--n-calib {args.n_calib} is less than one batch; lower --batch-size {args.batch_size}")


def _speed_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description="Time reconstruction, unit by unit, against forward and backward passes of the FP network.",
    )
    what = parser.add_argument_group("what to time")
    what.add_argument("--dataset", choices=DATASETS, default="cifar10", help="sets size of images (default: cifar10)")
    what.add_argument("--data", type=Path, metavar="ZIP_OR_FOLDER", help="CIFAR-10 images; default: random ones")
    what.add_argument("--model", choices=_models())
    what.add_argument("--weights", type=Path, metavar="FILE", help="state_dict of the FP network; default: random")
    what.add_argument("--method", choices=METHODS, default="qdrop")
    what.add_argument("--w-bits", type=_one_width, default=2, metavar="BITS", help="of weights (default: 2)")
    what.add_argument("--a-bits", type=_one_width, default=2, metavar="BITS", help="of activations (default: 2)")

    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=_positive, default=100, help="iterations a unit, a fifth of them to warm up")
    how.add_argument("--threads", type=_positive, default=1, help="of the processor (default: 1)")
    _add_quantization_options(how)

    where = parser.add_argument_group("where")
    where.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    where.add_argument("--cache", type=Path, default=_cache(), metavar="DIR", help="downloads")
    where.add_argument("--no-progress", action="store_true", help="no progress bars")
    return parser


def _add_quantization_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--n-calib", type=_positive, help="training images for quantization")
    group.add_argument("--batch-size", type=_positive, default=32, help="of the reconstruction (default: 32)")
    group.add_argument("--device", type=_device, default="cpu", help="where the networks run (default: cpu)")
    group.add_argument(
        "--cache-device",
        choices=CACHE_DEVICES,
        default="model",
        help="where inputs and outputs of units are kept: with the model, or on the cpu (default: model)",
    )


def _models() -> list[str]:
    return [model for each in DATASETS.values() for model in each.models]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Quantize a network, attach CAT, and report top-1 accuracy with and without it.",
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument("--dataset", choices=DATASETS, default="digits")
    what.add_argument(
        "--data", type=Path, metavar="ZIP_OR_FOLDER", help="train/<class>/* and test/<class>/*; default: download"
    )
    what.add_argument("--model", choices=_models())
    what.add_argument("--weights", type=Path, metavar="FILE", help="state_dict of the full-precision network")
    what.add_argument("--methods", nargs="+", choices=METHODS, default=["rtn", "qdrop"])
    what.add_argument(
        "--bits", nargs="+", type=_bits, metavar="W/A", default=[_bits(each) for each in BITS], help=" ".join(BITS)
    )
    what.add_argument("--seeds", nargs="+", type=_seed, metavar="SEED", default=[0])

    how = parser.add_argument_group("how")
    how.add_argument("--iters", type=_positive, help="iterations for each unit of the network")
    how.add_argument("--n-cat", type=_positive, help="other training images for the corrections")
    _add_quantization_options(how)

    where = parser.add_argument_group("where")
    where.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    where.add_argument("--run", metavar="NAME", help="folder in DIR; default: derived from the settings")
    where.add_argument("--cache", type=Path, default=_cache(), metavar="DIR", help="trained networks and downloads")
    where.add_argument("--fresh", action="store_true", help="measure again what the run has finished")
    where.add_argument("--no-progress", action="store_true", help="no progress bars")
    return parser


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "cat-plugin"


def _bits(text: str) -> tuple[int, int]:
    try:
        w_bits, a_bits = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should be WEIGHT_BITS/ACTIVATION_BITS such as 2/4") from None
    if not _possible(w_bits, a_bits):
        raise argparse.ArgumentTypeError(f"{text!r}: bits should be 2 to 8, or {FLOAT_BITS} for floating point")
    return w_bits, a_bits


def _one_width(text: str) -> int:
    bits = _whole_number(text, 2, FLOAT_BITS)
    if not _possible(bits):
        raise argparse.ArgumentTypeError(f"{text!r} should be 2 to 8, or {FLOAT_BITS} for floating point")
    return bits


def _possible(*bits: int) -> bool:
    return all(width == FLOAT_BITS or 2 <= width <= 8 for width in bits)


def _positive(text: str) -> int:
    return _whole_number(text, 1)


def _seed(text: str) -> int:
    return _whole_number(text, 0, 2**32 - 1)  # what scikit-learn accepts


def _whole_number(text: str, low: int, high: int | None = None) -> int:
    number = int(text) if text.isascii() and text.isdigit() else -1
    if number < low or (high is not None and number > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number {limits}")
    return number


def _device(text: str) -> str:
    try:
        # Has something computed and given back: the meta device would take tensors and hold none.
        ones = torch.ones(2, 2, device=text)
        (ones @ ones).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from None
    return text
