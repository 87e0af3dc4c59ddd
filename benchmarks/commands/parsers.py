"""The options of every command, with every default filled in.

All `parse_*` raise `BenchmarkError` for options that do not go together, and `SystemExit` for options that argparse
refuses by themselves, when it has printed why.
"""

import argparse
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from baselines import METHODS
from benchmarks import BenchmarkError
from benchmarks.commands.option_checks import (
    PRESETS,
    apply_preset,
    check_images,
    complete_networks,
    complete_sources,
    model_for,
    refuse_too_few,
)
from benchmarks.commands.option_groups import (
    DEFAULTS_SAID,
    add_network_options,
    add_quantization_options,
    add_run_options,
    add_source_options,
)
from benchmarks.commands.option_types import factor, network, one_width, positive, seed
from benchmarks.datasets.cifar10 import CIFAR10
from benchmarks.datasets.registry import DATASETS, DEFAULT_DATASET
from benchmarks.measure.corrections import MODES
from benchmarks.measure.factors import FACTORS, OF_OUTPUT
from benchmarks.measure.nulls import CASES
from benchmarks.networks.catalogue import ALL_NETWORKS
from benchmarks.wording import did_you_mean

IMAGES = 256, 512, 1024, 4096
MAX_DRAWS = 5
NULLS = "positions", "plain"


def parse_compare(argv: list[str]) -> argparse.Namespace:
    """The options of `python -m benchmarks compare`."""
    args = _compare_parser().parse_args(argv)
    apply_preset(args)
    # Of two halves of the test images, all but those to test on are for the corrections.
    args.n_cat = args.n_cat or (None if args.test_folds else DATASETS[args.dataset].n_cat)
    args.modes = [mode for mode in MODES if mode in args.modes]
    if args.n_cat is not None:
        refuse_too_few(args)
    complete_networks(args)
    return args


def parse_report(argv: list[str]) -> argparse.Namespace:
    """The options of `python -m benchmarks report`."""
    parser = _parser("report", "Make the tables of a run again, from the predictions in its folder; no model is run.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="such as results/digits-resnet8-1a2b")
    return parser.parse_args(argv)


def parse_ablate(argv: list[str]) -> argparse.Namespace:
    """The options of `python -m benchmarks ablate`; `factors` are values by name, `dataset` may be None."""
    args = _ablate_parser().parse_args(argv)
    args.factors = dict(args.factors)
    complete_sources(args)
    of_layers = [name for name in args.factors if FACTORS[name].of_layers]
    if of_layers and args.logits:
        raise BenchmarkError(f"{of_layers[0]} is of layers, which files of logits do not have; leave --logits out")
    return args


def parse_robustness(argv: list[str]) -> argparse.Namespace:
    """The options of `python -m benchmarks robustness`; `dataset` is None where no networks are asked for."""
    args = _robustness_parser().parse_args(argv)
    args.images = sorted(set(args.images))
    complete_sources(args)
    return args


def parse_nulls(argv: list[str]) -> argparse.Namespace:
    """The options of `python -m benchmarks nulls`; `cases` are names of `CASES`, in its order."""
    args = _nulls_parser().parse_args(argv)
    args.cases = [name for name in CASES if name in args.cases]
    return args


def parse_speed(argv: list[str]) -> argparse.Namespace:
    """The options of `python -m benchmarks speed`."""
    args = _speed_parser().parse_args(argv)
    description = DATASETS[args.dataset]
    if args.data is not None and description.in_files:
        raise BenchmarkError(f"speed takes random images in place of {description.title}'s; leave --data out")
    args.n_calib = args.n_calib or description.n_calib
    args.model = model_for(args)
    check_images(args)
    return args


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without all the options."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        known = [option for option in self._option_string_actions if option.startswith("--")]
        alike = dict.fromkeys(m for word in unknown for m in get_close_matches(word.partition("=")[0], known, 1))
        advice = f"; {did_you_mean(alike)}" if alike else ""
        self.exit(2, f"error: {message}{advice} ({self.prog} --help lists all options)\n")


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return _Parser(prog=f"python -m benchmarks {command}", description=description)


def _compare_parser() -> argparse.ArgumentParser:
    parser = _parser("compare", "Quantize a network, attach CAT, and compare top-1 accuracy with and without it.")
    what = parser.add_argument_group("what to measure")
    what.add_argument("--dataset", choices=DATASETS, default=DEFAULT_DATASET)
    add_network_options(what)
    what.add_argument(
        "--preset", choices=PRESETS, help="imagenet: the protocol of the papers; options that are given override it"
    )
    what.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of the correction; default: all")

    how = parser.add_argument_group("how")
    how.add_argument("--iters", type=positive, help=f"iterations for each unit of the network{DEFAULTS_SAID['iters']}")
    how.add_argument(
        "--n-cat",
        type=positive,
        help=f"other images for the corrections{DEFAULTS_SAID['n_cat']}; --test-folds: half of those for testing",
    )
    how.add_argument(
        "--test-folds",
        type=int,
        choices=[2],
        help="imagenet: correct on one half of the test images and test on the other, in turn",
    )
    add_quantization_options(how)
    add_run_options(parser)
    return parser


def _ablate_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "ablate",
        "Change one setting of a correction at a time, around paper mode and the default, on fresh images.",
    )
    add_source_options(parser)
    how = parser.add_argument_group("what to change")
    how.add_argument(
        "--factors",
        nargs="+",
        type=factor,
        default=[(name, FACTORS[name].values) for name in OF_OUTPUT],
        metavar="NAME[=VALUE,VALUE...]",
        help=f"of {', '.join(FACTORS)}; default: all of the output, with usual values; of layers only with --dataset",
    )
    how.add_argument("--n-cat", type=positive, default=1024, help="images for the corrections (default: 1024)")
    how.add_argument("--max-draws", type=positive, default=3, metavar="N", help="of as many images (default: 3)")
    add_run_options(parser)
    return parser


def _robustness_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "robustness", "Fit corrections on many disjoint draws of few images and report how much each gains or loses."
    )
    add_source_options(parser)
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


def _nulls_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "nulls",
        "Fit corrections on generated logits or networks where nothing can be gained, and count what is accepted.",
    )
    how = parser.add_argument_group("draws")
    how.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(NULLS), help=f"what to fit on (default: {' '.join(NULLS)})"
    )
    how.add_argument(
        "--draws", type=positive, default=40, metavar="N", help="of each case and number of images (default: 40)"
    )
    how.add_argument("--seed", type=seed, default=0, help="of all draws (default: 0)")
    add_run_options(parser)
    return parser


def _speed_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "speed", "Time reconstruction, unit by unit, against forward and backward passes of the FP network."
    )
    what = parser.add_argument_group("what to time")
    what.add_argument(
        "--dataset", choices=DATASETS, default=CIFAR10.name, help="sets size of images (default: cifar10)"
    )
    what.add_argument("--data", type=Path, metavar="ZIP_OR_FOLDER", help="CIFAR-10 images; default: random ones")
    what.add_argument("--model", type=network, metavar="NAME", help=", ".join(ALL_NETWORKS))
    what.add_argument("--weights", type=Path, metavar="FILE", help="state_dict of the FP network; default: random")
    what.add_argument("--method", choices=METHODS, default="qdrop")
    what.add_argument("--w-bits", type=one_width, default=2, metavar="BITS", help="of weights (default: 2)")
    what.add_argument("--a-bits", type=one_width, default=2, metavar="BITS", help="of activations (default: 2)")

    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=positive, default=100, help="iterations a unit, a fifth of them to warm up")
    how.add_argument("--threads", type=positive, default=1, help="of the processor (default: 1)")
    add_quantization_options(how)
    add_run_options(parser, resumes=False)
    return parser
