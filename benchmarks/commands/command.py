"""What the command lines share: exit codes, the network that they look at, and what is worth knowing about a run."""

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks import BenchmarkError
from benchmarks.datasets.data import Dataset, load_cifar10, load_digits
from benchmarks.datasets.imagenet import NAME as IMAGENET
from benchmarks.datasets.imagenet import class_names, load_imagenet
from benchmarks.datasets.images import stacked
from benchmarks.measure.evaluate import Setting
from benchmarks.measure.fp_check import check_accuracy
from benchmarks.measure.guard import LeakGuard
from benchmarks.networks.models import check_outputs, create_model, load_weights
from benchmarks.networks.pretrained import load_pretrained
from benchmarks.networks.training import trained_model
from benchmarks.runs.environment import describe_machine
from benchmarks.runs.processes import this_process
from cat_plugin import CATError


def exit_code(work: Callable[[], None], *, resumes: bool) -> int:
    """Do the work of a command line; 2 for input that the user can put right, 130 for an interruption.

    ``resumes`` says whether the same command goes on where it was stopped.
    """
    try:
        level = logging.WARNING if this_process().first else logging.ERROR
        logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
        work()
    except (BenchmarkError, CATError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command resumes" if resumes else "stopped", file=sys.stderr)
        return 130
    return 0


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A data set and a full-precision network on its device.

    ``weights`` says where the network is from, alike wherever a file lies; ``fp_check`` is a sentence about its
    accuracy, or None.
    """

    dataset: Dataset
    model: nn.Module
    weights: str
    fp_check: str | None = None


def load_network(args: argparse.Namespace) -> Loaded:
    """The data set and the network that the options ask for.

    Raises:
        BenchmarkError: there are none, or they do not fit; or several processes would download images at once.
    """
    process = this_process()
    progress = not args.no_progress and process.first
    if args.dataset == IMAGENET:
        return _load_imagenet(args, progress)
    if args.dataset == "digits":
        dataset = load_digits()
    else:
        dataset = load_cifar10(args.data, args.cache, download=process.alone, progress=progress)
    if args.weights is None:
        LeakGuard(dataset.test_images).check(dataset.train_images, "images to train on")
        model, weights = trained_model(args.model, dataset, args.cache, progress=progress), "trained here"
    else:
        weights = _file(args.weights)
        model = create_model(args.model, len(dataset.classes))
        load_weights(model, args.weights)
        check_outputs(model, dataset.test_images, dataset.classes)
    return Loaded(dataset=dataset, model=model.to(args.device), weights=weights)


def _file(path: Path) -> str:
    return f"the file {path.name}"


def _load_imagenet(args: argparse.Namespace, progress: bool) -> Loaded:
    """As :func:`load_network`; the network has been found as accurate as published, where that is known."""
    found = load_pretrained(args.model, str(args.weights), len(class_names(args.data)))
    dataset = load_imagenet(args.data, found.transform, args.workers)
    check_outputs(found.model, stacked(dataset.test_images[:1]), dataset.classes)
    model = found.model.to(args.device)
    expected, source = (found.published, found.source) if args.fp_top1 is None else (args.fp_top1, "--fp-top1")
    if expected is None:
        told = (
            f"full-precision top-1 is not checked: no published top-1 is stored here for {source}; --fp-top1 says what "
            "to expect"
        )
    else:
        told = check_accuracy(model, dataset, expected, source, args.cache, progress=progress)
    if this_process().first:
        print(told, flush=True)
    weights = _file(args.weights) if found.source == str(args.weights) else found.source
    return Loaded(dataset=dataset, model=model, weights=weights, fp_check=told)


def settings_grid(args: argparse.Namespace) -> list[Setting]:
    """Every method, bit setting and seed."""
    return [Setting(method, *bits, seed) for method, bits, seed in product(args.methods, args.bits, args.seeds)]


def environment(command: str, argv: Sequence[str], args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What is worth knowing about a run, besides its settings.

    ``command`` is that of ``python -m benchmarks``, ``argv`` its options and ``args`` what they mean; ``seconds`` is
    what all rows took to measure.
    """
    return {
        "command": shlex.join(["python", "-m", "benchmarks", command, *argv]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "seeds": list(args.seeds),
        **describe_machine(args.device),
    }
