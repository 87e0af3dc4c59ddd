"""The data set and the full-precision network that the options ask for."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.datasets.dataset import Dataset
from benchmarks.datasets.description import Request
from benchmarks.datasets.imagenet import VAL_IMAGES
from benchmarks.datasets.images import stacked
from benchmarks.datasets.registry import DATASETS
from benchmarks.measure.fp_check import check_accuracy
from benchmarks.measure.leak_guard import LeakGuard
from benchmarks.networks.model_functions import load_from_function
from benchmarks.networks.models import check_outputs, count_outputs
from benchmarks.networks.training import trained_model
from benchmarks.networks.weights_and_transforms import RANDOM, Pretrained, load_pretrained, named_outputs
from benchmarks.runs.files import digest_text
from benchmarks.runs.processes import this_process
from benchmarks.wording import lasting


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A data set and a full-precision network on its device.

    `weights` says where the network is from, alike wherever a file lies, and `digest` changes with what it computes;
    what is made of it is kept in `cache`. `fp_check` is a sentence about its accuracy, or None.
    """

    dataset: Dataset
    model: nn.Module
    weights: str
    cache: Path
    digest: str
    fp_check: str | None = None


def request(args: argparse.Namespace) -> Request:
    """What the options say on how images are to be had."""
    process = this_process()
    return Request(
        data=args.data,
        cache=args.cache,
        calib_data=tuple(args.calib_data or ()),
        cat_data=tuple(args.cat_data or ()),
        test_data=tuple(args.test_data or ()),
        classes=args.classes,
        test_folds=getattr(args, "test_folds", None) or 1,
        n_calib=args.n_calib,
        download=process.alone,
        workers=args.workers,
        accelerated=torch.device(args.device).type != "cpu",
        progress=not args.no_progress and process.first,
    )


def load_network(args: argparse.Namespace, needs: Callable[[Dataset], object] | None = None) -> Loaded:
    """The data set and the network that the options ask for.

    `needs` may look at the data, and raise `BenchmarkError`, before the network is run on many of them. Where there are
    published networks for the data set, this one has been found as accurate as published, as far as that is known.

    Raises:
        BenchmarkError: there are none, or they do not fit; or several processes would download images at once.
    """
    asked, description = request(args), DATASETS[args.dataset]
    if args.weights is None and args.model_fn is None:
        dataset = description.load(asked)
        LeakGuard(dataset.test_images).check(dataset.train_images, "images to train on")
        if needs is not None:
            needs(dataset)
        model = trained_model(args.model, dataset, args.cache, device=args.device, progress=asked.progress)
        weights, digest = "trained here", digest_text(lasting(model))
        return Loaded(dataset=dataset, model=model, weights=weights, cache=args.cache, digest=digest)
    found = _network(args, partial(description.output_count, asked))
    outputs = partial(count_outputs, found.model)
    dataset = description.load(replace(asked, transform=found.transform, outputs=outputs))
    if needs is not None:
        needs(dataset)
    check_outputs(found.model, stacked(dataset.test_images[:1]), dataset.classes)
    model = found.model.to(args.device)
    is_file = args.weights is not None and found.source == str(args.weights) and args.weights.is_file()
    # Networks of functions may compute other things with the same weights, so they have caches of their own.
    cache = args.cache / "functions" / found.code if found.code else args.cache
    return Loaded(
        dataset=dataset,
        model=model,
        weights=f"the file {args.weights.name}" if is_file else found.source,
        cache=cache,
        digest=digest_text(lasting(found.model), found.code),
        fp_check=_fp_check(args, found, dataset, cache, asked.progress) if description.published else None,
    )


def _network(args: argparse.Namespace, output_count: Callable[[int | None], int]) -> Pretrained:
    """The network that the options name. What can be wrong with labels is seen before weights that have a name are
    downloaded, or a function of the user's is called."""
    if args.model_fn is not None:
        output_count(None)
        return load_from_function(args.model_fn, args.weights)
    weights = str(args.weights)
    return load_pretrained(args.model, weights, output_count(named_outputs(args.model, weights)))


def _fp_check(args: argparse.Namespace, found: Pretrained, dataset: Dataset, cache: Path, progress: bool) -> str:
    """Print, too, what is found."""
    expected, source, images = found.published, found.source, VAL_IMAGES
    if args.fp_top1 is not None:
        expected, source, images = args.fp_top1, "--fp-top1", None
    if expected is None and found.source == RANDOM:
        told = "full-precision top-1 is not checked: weights are random, so that no accuracy here is a result"
    elif expected is None:
        told = (
            f"full-precision top-1 is not checked: no published top-1 is stored here for {source}; --fp-top1 says what "
            "to expect"
        )
    else:
        told = check_accuracy(found.model, dataset, expected, source, cache, images=images, progress=progress)
    if this_process().first:
        print(told, flush=True)
    return told
