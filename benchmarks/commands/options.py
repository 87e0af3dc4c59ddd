"""The options of every command, and what they mean where they are not given."""

import argparse
from pathlib import Path

from baselines import METHODS
from benchmarks import BenchmarkError
from benchmarks.commands.arguments import (
    DATASETS,
    METHODS_BY_DEFAULT,
    add_network_options,
    add_quantization_options,
    add_run_options,
    add_source_options,
    cache,
    factor,
    models,
    network,
    one_width,
    positive,
)
from benchmarks.datasets.imagenet import NAME as IMAGENET
from benchmarks.datasets.imagenet import default_workers
from benchmarks.measure.evaluate import MODES, PAPER_CLUSTERS, corrections
from benchmarks.measure.factors import FACTORS
from benchmarks.networks.pretrained import DEFAULT, features_of, is_timm
from benchmarks.runs.processes import this_process

IMAGES = 256, 512, 1024, 4096
MAX_DRAWS = 5
# Of the papers; batches of 32, all four bit settings, and 8 bits in first and last layer are the defaults.
PRESETS = {"paper": {"methods": ["pd_quant"], "iters": 20_000, "n_calib": 1024, "n_cat": 1024}}
PAPER_WEIGHTS = "IMAGENET1K_V1"  # the ones that come nearest to the full-precision accuracy in the papers


def parse_compare(argv: list[str]) -> argparse.Namespace:
    """The options of ``python -m benchmarks compare`` with every default filled in.

    Raises:
        BenchmarkError: options that do not go together.
        SystemExit: options that argparse refuses by themselves; it has printed why.
    """
    args = _compare_parser().parse_args(argv)
    _apply_preset(args)
    args.n_cat = args.n_cat or DATASETS[args.dataset].n_cat
    args.modes = [mode for mode in MODES if mode in args.modes]
    _refuse_too_few(args)
    _complete_networks(args)
    return args


def parse_report(argv: list[str]) -> argparse.Namespace:
    """The options of ``python -m benchmarks report``.

    Raises:
        SystemExit: options that argparse refuses; it has printed why.
    """
    parser = _parser("report", "Make the tables of a run again, from the predictions in its folder; no model is run.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="such as results/digits-resnet8-1a2b")
    return parser.parse_args(argv)


def parse_ablate(argv: list[str]) -> argparse.Namespace:
    """The options of ``python -m benchmarks ablate``; ``factors`` are values by name, ``dataset`` may be None.

    Raises:
        BenchmarkError: options that do not go together.
        SystemExit: options that argparse refuses by themselves; it has printed why.
    """
    args = _ablate_parser().parse_args(argv)
    args.factors = dict(args.factors)
    _complete_sources(args)
    if args.dataset is not None and args.features is None:
        args.features = DATASETS[args.dataset].features.get(args.model) or features_of(args.model)
    return args


def parse_robustness(argv: list[str]) -> argparse.Namespace:
    """The options of ``python -m benchmarks robustness``; ``dataset`` is None where no networks are asked for.

    Raises:
        BenchmarkError: options that do not go together.
        SystemExit: options that argparse refuses by themselves; it has printed why.
    """
    args = _robustness_parser().parse_args(argv)
    args.images = sorted(set(args.images))
    _complete_sources(args)
    return args


def parse_speed(argv: list[str]) -> argparse.Namespace:
    """The options of ``python -m benchmarks speed`` with every default filled in.

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


def _complete_sources(args: argparse.Namespace) -> None:
    """Digits where nothing is named; options of networks only where there are networks."""
    if args.dataset is None and not args.logits:
        args.dataset = "digits"
    if args.dataset is not None:
        _complete_networks(args)
        return
    for name in ("data", "model", "weights", "fp_top1", "workers", "iters", "n_calib"):
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise BenchmarkError(f"{option} is for networks, which beside --logits are asked for by --dataset")


def _complete_networks(args: argparse.Namespace) -> None:
    """Fill in what is not given of the networks to quantize, and refuse what does not go together."""
    defaults = DATASETS[args.dataset]
    args.iters, args.n_calib = args.iters or defaults.iters, args.n_calib or defaults.n_calib
    args.methods = args.methods or METHODS_BY_DEFAULT
    args.model = _model_for(args)
    _complete_imagenet(args)
    if args.weights is None and not defaults.trains:
        raise BenchmarkError(
            f"--dataset {args.dataset} needs --weights FILE, a state_dict of {args.model} trained on these images: "
            "training it here would take hours; without --dataset a small network is trained on the digits"
        )
    _check_images(args)
    args.methods, args.bits, args.seeds = (list(dict.fromkeys(each)) for each in (args.methods, args.bits, args.seeds))


def _refuse_too_few(args: argparse.Namespace) -> None:
    # Else everything would be quantized before it turns out that there is nothing to report.
    if not set(args.modes) & corrections(args.n_cat, seed=0).keys():
        raise BenchmarkError(
            f"--n-cat {args.n_cat} is too few for --modes {' '.join(args.modes)}, which has {PAPER_CLUSTERS} clusters "
            "and needs an image for each; give more, or another mode beside it"
        )


def _apply_preset(args: argparse.Namespace) -> None:
    """What a preset says where the options say nothing."""
    if args.preset is None:
        return
    if args.dataset != IMAGENET:
        raise BenchmarkError(f"--preset {args.preset} is for --dataset imagenet, got --dataset {args.dataset}")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.weights is None:
        args.weights = Path(DEFAULT if is_timm(_model_for(args)) else PAPER_WEIGHTS)


def _complete_imagenet(args: argparse.Namespace) -> None:
    if args.dataset != IMAGENET:
        for name in ("fp_top1", "workers"):
            if getattr(args, name) is not None:
                raise BenchmarkError(f"--{name.replace('_', '-')} is for --dataset imagenet")
        return
    if args.data is None:
        raise BenchmarkError("--dataset imagenet needs --data DIR with train/<class>/* and val/<class>/*")
    args.weights = args.weights or Path(DEFAULT)
    args.workers = default_workers(this_process().local_world) if args.workers is None else args.workers


def _model_for(args: argparse.Namespace) -> str:
    known = DATASETS[args.dataset].models
    model = args.model or known[0]
    if model not in known and not (args.dataset == IMAGENET and is_timm(model)):
        raise BenchmarkError(f"--model {model} is not for {args.dataset}; choose from {', '.join(known)}")
    return model


def _check_images(args: argparse.Namespace) -> None:
    if args.data is not None and args.dataset == "digits":
        raise BenchmarkError("--data is not for digits, which come with scikit-learn; did you mean --dataset cifar10?")
    if args.n_calib < args.batch_size:
        raise BenchmarkError(f"--n-calib {args.n_calib} is less than one batch; lower --batch-size {args.batch_size}")


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m benchmarks {command}", description=description)


def _compare_parser() -> argparse.ArgumentParser:
    parser = _parser("compare", "Quantize a network, attach CAT, and compare top-1 accuracy with and without it.")
    what = parser.add_argument_group("what to measure")
    what.add_argument("--dataset", choices=DATASETS, default="digits")
    add_network_options(what)
    what.add_argument(
        "--preset", choices=PRESETS, help="imagenet: the protocol of the papers; options that are given go before it"
    )
    what.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of the correction; default: all")

    how = parser.add_argument_group("how")
    how.add_argument("--iters", type=positive, help="iterations for each unit of the network")
    how.add_argument("--n-cat", type=positive, help="other training images for the corrections")
    add_quantization_options(how)
    add_run_options(parser)
    return parser


def _ablate_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "ablate", "Change one setting of the correction at a time, around paper mode and the default, on fresh images."
    )
    add_source_options(parser)
    how = parser.add_argument_group("what to change")
    how.add_argument(
        "--factors",
        nargs="+",
        type=factor,
        default=[(name, each.values) for name, each in FACTORS.items()],
        metavar="NAME[=VALUE,VALUE...]",
        help=f"of {', '.join(FACTORS)}; default: all, with usual values",
    )
    how.add_argument("--n-cat", type=positive, default=1024, help="images for the corrections (default: 1024)")
    how.add_argument("--max-draws", type=positive, default=3, metavar="N", help="of as many images (default: 3)")
    how.add_argument("--features", metavar="LAYER", help="of the networks, for the factor features; default: the last")
    add_run_options(parser)
    return parser


def _robustness_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "robustness", "Fit corrections on many disjoint draws of few images and report how much each gains or loses."
    )
    add_source_options(parser)
    parser.set_defaults(features=None)
    how = parser.add_argument_group("draws")
    sizes = " ".join(map(str, IMAGES))
    how.add_argument(
        "--images", nargs="+", type=positive, default=list(IMAGES), metavar="N", help=f"in a draw (default: {sizes})"
    )
    how.add_argument(
        "--max-draws", type=positive, default=MAX_DRAWS, metavar="N", help=f"of each size (default: {MAX_DRAWS})"
    )
    add_run_options(parser)
    return parser


def _speed_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "speed", "Time reconstruction, unit by unit, against forward and backward passes of the FP network."
    )
    what = parser.add_argument_group("what to time")
    what.add_argument("--dataset", choices=DATASETS, default="cifar10", help="sets size of images (default: cifar10)")
    what.add_argument("--data", type=Path, metavar="ZIP_OR_FOLDER", help="CIFAR-10 images; default: random ones")
    what.add_argument("--model", type=network, metavar="NAME", help=", ".join(models()))
    what.add_argument("--weights", type=Path, metavar="FILE", help="state_dict of the FP network; default: random")
    what.add_argument("--method", choices=METHODS, default="qdrop")
    what.add_argument("--w-bits", type=one_width, default=2, metavar="BITS", help="of weights (default: 2)")
    what.add_argument("--a-bits", type=one_width, default=2, metavar="BITS", help="of activations (default: 2)")

    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=positive, default=100, help="iterations a unit, a fifth of them to warm up")
    how.add_argument("--threads", type=positive, default=1, help="of the processor (default: 1)")
    add_quantization_options(how)

    where = parser.add_argument_group("where")
    where.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    where.add_argument("--cache", type=Path, default=cache(), metavar="DIR", help="downloads")
    where.add_argument("--no-progress", action="store_true", help="no progress bars")
    return parser
