"""What options mean where they are not given, and which of them do not go together."""

import argparse
from pathlib import Path

from benchmarks import BenchmarkError
from benchmarks.commands.option_groups import METHODS_BY_DEFAULT
from benchmarks.datasets.cifar10 import CIFAR10
from benchmarks.datasets.imagenet import default_workers
from benchmarks.datasets.registry import DATASETS, DEFAULT_DATASET
from benchmarks.measure.corrections import PAPER_CLUSTERS, corrections
from benchmarks.networks.catalogue import NETWORKS, is_for, is_timm
from benchmarks.networks.model_functions import function_name
from benchmarks.networks.training import RECIPES
from benchmarks.networks.weights_and_transforms import DEFAULT
from benchmarks.runs.processes import this_process

# Of the papers; batches of 32, all four bit settings, and 8 bits in first and last layer are the defaults.
PRESETS = {"paper": {"methods": ["pd_quant"], "iters": 20_000, "n_calib": 1024, "n_cat": 1024}}
BATCH_SIZE = 32  # of the papers
PAPER_WEIGHTS = "IMAGENET1K_V1"  # the ones that come nearest to the full-precision accuracy in the papers
PLACES = "calib_data", "cat_data", "test_data"
QUALITIES = {"fp_top1": "published", "model_fn": "published", "workers": "in_files", "classes": "in_files"}
QUALITIES |= {"test_folds": "in_files"} | dict.fromkeys(PLACES, "in_files")
"""What a data set must be for an option."""


def complete_sources(args: argparse.Namespace) -> None:
    """Digits where nothing is named; options of networks only where there are networks."""
    if args.dataset is None and not args.logits:
        args.dataset = DEFAULT_DATASET
    if args.dataset is not None:
        complete_networks(args)
        return
    for name in ("data", *PLACES, "classes", "model", "model_fn", "weights", "fp_top1", "workers", "iters", "n_calib"):
        if getattr(args, name) is not None:
            raise BenchmarkError(f"{_option(name)} is for networks, which beside --logits are asked for by --dataset")


def complete_networks(args: argparse.Namespace) -> None:
    """Fill in what is not given of the networks to quantize, and refuse what does not go together."""
    description = DATASETS[args.dataset]
    args.iters, args.n_calib = args.iters or description.iters, args.n_calib or description.n_calib
    args.methods = args.methods or METHODS_BY_DEFAULT
    args.model = model_for(args)
    _refuse_foreign(args)
    if description.in_files:
        if args.data is None and args.test_data is None:
            raise BenchmarkError(
                f"--dataset {args.dataset} needs --data DIR with train/<class>/* and val/<class>/*, "
                "or --test-data PLACE"
            )
        if args.cat_data is not None and getattr(args, "test_folds", None):
            raise BenchmarkError("--test-folds fits corrections on test images in turn; leave --cat-data out")
        args.workers = default_workers(this_process().local_world) if args.workers is None else args.workers
    if args.weights is None and args.model_fn is None and description.published:
        args.weights = Path(DEFAULT)
    trained_here = description.network_is_trained or args.model in RECIPES
    if args.weights is None and args.model_fn is None and not trained_here:
        raise BenchmarkError(
            f"--dataset {args.dataset} needs --weights FILE, a state_dict of {args.model} trained on these images: "
            f"training it here would take hours; --model {' or '.join(RECIPES)} needs none, and without --dataset a "
            f"small network is trained on the {DEFAULT_DATASET}"
        )
    check_images(args)
    args.methods, args.bits, args.seeds = (list(dict.fromkeys(each)) for each in (args.methods, args.bits, args.seeds))


def _refuse_foreign(args: argparse.Namespace) -> None:
    """Options that are for other data sets."""
    for name, quality in QUALITIES.items():
        if getattr(args, name, None) is not None and not getattr(DATASETS[args.dataset], quality):
            raise BenchmarkError(f"{_option(name)} is for --dataset {_datasets(quality)}")


def _datasets(quality: str) -> str:
    return " or ".join(each.name for each in DATASETS.values() if getattr(each, quality))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def refuse_too_few(args: argparse.Namespace) -> None:
    # Else everything would be quantized before it turns out that there is nothing to report.
    if not set(args.modes) & corrections(args.n_cat, seed=0).keys():
        raise BenchmarkError(
            f"--n-cat {args.n_cat} is too few for --modes {' '.join(args.modes)}, which has {PAPER_CLUSTERS} clusters "
            "and needs an image for each; give more, or another mode beside it"
        )


def apply_preset(args: argparse.Namespace) -> None:
    """What a preset says where the options say nothing."""
    if args.preset is None:
        return
    if not DATASETS[args.dataset].published:
        fitting = _datasets("published")
        raise BenchmarkError(f"--preset {args.preset} is for --dataset {fitting}, got --dataset {args.dataset}")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.weights is None and args.model_fn is None:
        args.weights = Path(DEFAULT if is_timm(model_for(args)) else PAPER_WEIGHTS)


def model_for(args: argparse.Namespace) -> str:
    known = NETWORKS[args.dataset]
    if getattr(args, "model_fn", None) is not None:
        if args.model is not None:
            raise BenchmarkError(
                f"--model {args.model} and --model-fn {args.model_fn} are two networks; give one of them"
            )
        return function_name(args.model_fn)
    model = args.model or known[0]
    if not is_for(model, DATASETS[args.dataset]):
        raise BenchmarkError(f"--model {model} is not for {args.dataset}; choose from {', '.join(known)}")
    return model


def check_images(args: argparse.Namespace) -> None:
    library = DATASETS[args.dataset].bundled_with
    if args.data is not None and library is not None:
        raise BenchmarkError(
            f"--data is not for {args.dataset}, which come with {library}; did you mean --dataset {CIFAR10.name}?"
        )
    args.batch_size = args.batch_size or min(BATCH_SIZE, args.n_calib)
    if args.n_calib < args.batch_size:
        raise BenchmarkError(f"--n-calib {args.n_calib} is less than one batch; lower --batch-size {args.batch_size}")
