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
IMAGES = 256, 512, 1024, 4096
MAX_DRAWS = 5


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
    args.n_cat = args.n_cat or DATASETS[args.dataset].n_cat
    _complete_networks(args)
    return args


def parse_robustness(argv: list[str]) -> argparse.Namespace:
    """The options of ``python -m benchmarks.robustness``; ``dataset`` is None where no networks are asked for.

    Raises:
        BenchmarkError: options that do not go together.
        SystemExit: options that argparse refuses by themselves; it has printed why.
    """
    args = _robustness_parser().parse_args(argv)
    args.images = sorted(set(args.images))
    if args.dataset is None and not args.logits:
        args.dataset = "digits"
    if args.dataset is not None:
        _complete_networks(args)
    else:
        for name in ("data", "model", "weights", "iters", "n_calib"):
            if getattr(args, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise BenchmarkError(f"{option} is for networks, which beside --logits are asked for by --dataset")
    return args


def _complete_networks(args: argparse.Namespace) -> None:
    """Fill in what is not given of the networks to quantize, and refuse what does not go together."""
    defaults = DATASETS[args.dataset]
    args.iters, args.n_calib = args.iters or defaults.iters, args.n_calib or defaults.n_calib
    args.model = _model_for(args)
    if args.weights is None and not defaults.trains:
        raise BenchmarkError(
            f"--dataset {args.dataset} needs --weights FILE, a state_dict of {args.model} trained on these images: "
            "training it here would take hours; without --dataset a small network is trained on the digits"
        )
    _check_images(args)
    args.methods, args.bits, args.seeds = (list(dict.fromkeys(each)) for each in (args.methods, args.bits, args.seeds))


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
    _add_network_options(what)

    how = parser.add_argument_group("how")
    how.add_argument("--iters", type=_positive, help="iterations for each unit of the network")
    how.add_argument("--n-cat", type=_positive, help="other training images for the corrections")
    _add_quantization_options(how)
    _add_run_options(parser)
    return parser


def _robustness_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness",
        description="Fit corrections on many disjoint draws of few images and report how much each gains or loses.",
    )
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
        "--skip", type=_natural, default=1024, metavar="ROWS", help="first ones, tuned on, left out (default: 1024)"
    )

    what = parser.add_argument_group("networks to quantize")
    what.add_argument("--dataset", choices=DATASETS, help="default: digits where there are no --logits")
    _add_network_options(what)
    what.add_argument("--iters", type=_positive, help="iterations for each unit of the network")
    _add_quantization_options(what)

    how = parser.add_argument_group("draws")
    sizes = " ".join(map(str, IMAGES))
    how.add_argument(
        "--images", nargs="+", type=_positive, default=list(IMAGES), metavar="N", help=f"in a draw (default: {sizes})"
    )
    how.add_argument(
        "--max-draws", type=_positive, default=MAX_DRAWS, metavar="N", help=f"of each size (default: {MAX_DRAWS})"
    )
    _add_run_options(parser)
    return parser


def _add_network_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data", type=Path, metavar="ZIP_OR_FOLDER", help="train/<class>/* and test/<class>/*; default: download"
    )
    group.add_argument("--model", choices=_models())
    group.add_argument("--weights", type=Path, metavar="FILE", help="state_dict of the full-precision network")
    group.add_argument("--methods", nargs="+", choices=METHODS, default=["rtn", "qdrop"])
    group.add_argument(
        "--bits", nargs="+", type=_bits, metavar="W/A", default=[_bits(each) for each in BITS], help=" ".join(BITS)
    )
    group.add_argument("--seeds", nargs="+", type=_seed, metavar="SEED", default=[0])


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where")
    where.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    where.add_argument("--run", metavar="NAME", help="folder in DIR; default: derived from the settings")
    where.add_argument("--cache", type=Path, default=_cache(), metavar="DIR", help="trained networks and downloads")
    where.add_argument("--fresh", action="store_true", help="measure again what the run has finished")
    where.add_argument("--no-progress", action="store_true", help="no progress bars")


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


def _natural(text: str) -> int:
    return _whole_number(text, 0)


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
