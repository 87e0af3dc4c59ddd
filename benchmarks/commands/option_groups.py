"""Groups of options that several commands have."""

import argparse
import os
from pathlib import Path

from baselines import METHODS
from baselines.api import CACHE_DEVICES
from benchmarks.commands.option_types import bits, device, natural, network, percent, positive, seed
from benchmarks.datasets.registry import DATASETS
from benchmarks.networks.catalogue import ALL_NETWORKS

METHODS_BY_DEFAULT = "rtn", "qdrop"
BITS = "2/2", "2/4", "4/2", "4/4"


DEFAULTS_SAID = {
    what: f" (default: {', '.join(f'{name} {getattr(each, what):,}' for name, each in DATASETS.items())})"
    for what in ("iters", "n_calib", "n_cat")
}


def add_network_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        type=Path,
        metavar="ZIP_OR_FOLDER",
        help="train/<class>/* and test/<class>/*, for imagenet a folder with val/<class>/*; default: download CIFAR-10",
    )
    for part, use in (("calib", "quantization"), ("cat", "corrections"), ("test", "testing")):
        group.add_argument(
            f"--{part}-data",
            nargs="+",
            metavar="PLACE",
            help=f"imagenet: images for {use} alone: folders, files of labels, tar files; instead of those in --data",
        )
    group.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="imagenet: classes in the order of the network's outputs, one a line",
    )
    group.add_argument(
        "--model",
        type=network,
        metavar="NAME",
        help=f"{', '.join(ALL_NETWORKS)}; for imagenet also timm/NAME and torchvision/NAME of any that classify",
    )
    group.add_argument(
        "--model-fn",
        metavar="MODULE:FUNCTION",
        help="imagenet, instead of --model: function that returns the full-precision network, or a pair of it and its "
        "transform of RGB images; MODULE may be path/to/file.py",
    )
    group.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="state_dict of the full-precision network, or PACKAGE:ATTRIBUTE that leads to one; for imagenet also the "
        "name of published weights, such as IMAGENET1K_V1 (default: DEFAULT), or random; vit is trained without",
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
    what.add_argument("--iters", type=positive, help=f"iterations for each unit of the network{DEFAULTS_SAID['iters']}")
    add_quantization_options(what)


def add_quantization_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--n-calib", type=positive, help=f"training images for quantization{DEFAULTS_SAID['n_calib']}")
    group.add_argument(
        "--batch-size", type=positive, help="of the reconstruction (default: 32, or all images of --n-calib)"
    )
    group.add_argument("--device", type=device, default="cpu", help="where the networks run (default: cpu)")
    group.add_argument(
        "--cache-device",
        choices=CACHE_DEVICES,
        default="model",
        help="where inputs and outputs of units are kept: with the model, or on the cpu (default: model)",
    )


def add_run_options(parser: argparse.ArgumentParser, *, resumes: bool = True) -> None:
    where = parser.add_argument_group("where")
    where.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    where.add_argument(
        "--cache",
        type=Path,
        default=cache(),
        metavar="DIR",
        help="trained networks and downloads (default: %(default)s)",
    )
    if resumes:
        where.add_argument("--run", metavar="NAME", help="folder in DIR; default: derived from the settings")
        where.add_argument("--fresh", action="store_true", help="measure again what the run has finished")
    where.add_argument("--no-progress", action="store_true", help="no progress bars")


def cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "cat-plugin"
