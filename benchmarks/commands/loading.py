"""The data set and the full-precision network that the options ask for."""

import argparse
from dataclasses import dataclass, replace

from torch import nn

from benchmarks.datasets.dataset import Dataset
from benchmarks.datasets.description import Request
from benchmarks.datasets.images import stacked
from benchmarks.datasets.registry import DATASETS
from benchmarks.measure.fp_check import check_accuracy
from benchmarks.measure.leak_guard import LeakGuard
from benchmarks.networks.models import check_outputs
from benchmarks.networks.training import trained_model
from benchmarks.networks.weights_and_transforms import Pretrained, load_pretrained
from benchmarks.runs.processes import this_process


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A data set and a full-precision network on its device.

    `weights` says where the network is from, alike wherever a file lies; `fp_check` is a sentence about its accuracy,
    or None.
    """

    dataset: Dataset
    model: nn.Module
    weights: str
    fp_check: str | None = None


def request(args: argparse.Namespace) -> Request:
    """What the options say on how images are to be had."""
    process = this_process()
    return Request(
        data=args.data,
        cache=args.cache,
        download=process.alone,
        workers=args.workers,
        progress=not args.no_progress and process.first,
    )


def load_network(args: argparse.Namespace) -> Loaded:
    """The data set and the network that the options ask for.

    Where there are published networks for the data set, this one has been found as accurate as published, as far as
    that is known.

    Raises:
        BenchmarkError: there are none, or they do not fit; or several processes would download images at once.
    """
    asked, description = request(args), DATASETS[args.dataset]
    if args.weights is None:
        dataset = description.load(asked)
        LeakGuard(dataset.test_images).check(dataset.train_images, "images to train on")
        model = trained_model(args.model, dataset, args.cache, progress=asked.progress)
        return Loaded(dataset=dataset, model=model.to(args.device), weights="trained here")
    found = load_pretrained(args.model, str(args.weights), description.count_classes(args.data))
    dataset = description.load(replace(asked, transform=found.transform))
    check_outputs(found.model, stacked(dataset.test_images[:1]), dataset.classes)
    model = found.model.to(args.device)
    return Loaded(
        dataset=dataset,
        model=model,
        weights=f"the file {args.weights.name}" if found.source == str(args.weights) else found.source,
        fp_check=_fp_check(args, found, dataset, asked.progress) if description.published else None,
    )


def _fp_check(args: argparse.Namespace, found: Pretrained, dataset: Dataset, progress: bool) -> str:
    """Print, too, what is found."""
    expected, source = (found.published, found.source) if args.fp_top1 is None else (args.fp_top1, "--fp-top1")
    if expected is None:
        told = (
            f"full-precision top-1 is not checked: no published top-1 is stored here for {source}; --fp-top1 says what "
            "to expect"
        )
    else:
        told = check_accuracy(found.model, dataset, expected, source, args.cache, progress=progress)
    if this_process().first:
        print(told, flush=True)
    return told
