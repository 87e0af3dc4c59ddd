"""What the command lines share: exit codes, the network that they look at, and what is worth knowing about a run."""

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from itertools import product
from typing import Any

from torch import nn

from benchmarks import BenchmarkError
from benchmarks.data import Dataset, load_cifar10, load_digits
from benchmarks.environment import describe_machine
from benchmarks.evaluate import Setting
from benchmarks.fp_check import check_accuracy
from benchmarks.guard import LeakGuard
from benchmarks.imagenet import NAME as IMAGENET
from benchmarks.imagenet import class_names, load_imagenet
from benchmarks.images import stacked
from benchmarks.models import check_outputs, create_model, load_weights
from benchmarks.pretrained import load_pretrained
from benchmarks.processes import this_process
from benchmarks.training import trained_model
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


def load_network(args: argparse.Namespace) -> tuple[Dataset, nn.Module]:
    """The data set, and the full-precision network on its device, that the options ask for."""
    progress = not args.no_progress and this_process().first
    if args.dataset == IMAGENET:
        return _load_imagenet(args, progress)
    dataset = load_digits() if args.dataset == "digits" else load_cifar10(args.data, args.cache, progress=progress)
    if args.weights is None:
        LeakGuard(dataset.test_images).check(dataset.train_images, "images to train on")
        model = trained_model(args.model, dataset, args.cache, progress=progress)
    else:
        model = create_model(args.model, len(dataset.classes))
        load_weights(model, args.weights)
        check_outputs(model, dataset.test_images, dataset.classes)
    return dataset, model.to(args.device)


def _load_imagenet(args: argparse.Namespace, progress: bool) -> tuple[Dataset, nn.Module]:
    """As :func:`load_network`; the network has been found as accurate as published, where that is known."""
    found = load_pretrained(args.model, str(args.weights), len(class_names(args.data)))
    dataset = load_imagenet(args.data, found.transform, args.workers)
    check_outputs(found.model, stacked(dataset.test_images[:1]), dataset.classes)
    model = found.model.to(args.device)
    expected, source = (found.published, found.source) if args.fp_top1 is None else (args.fp_top1, "--fp-top1")
    if expected is None:
        told = f"full-precision top-1 is not checked: none is published for {source}; --fp-top1 says what to expect"
    else:
        told = check_accuracy(model, dataset, expected, source, args.cache, progress=progress)
    if this_process().first:
        print(told, flush=True)
    return dataset, model


def settings_grid(args: argparse.Namespace) -> list[Setting]:
    """Every method, bit setting and seed."""
    return [Setting(method, *bits, seed) for method, bits, seed in product(args.methods, args.bits, args.seeds)]


def environment(command: str, argv: Sequence[str], seeds: Sequence[int], seconds: float) -> dict[str, Any]:
    """What is worth knowing about a run, besides its settings.

    ``command`` is that of ``python -m benchmarks``; ``seconds`` is what all rows took to measure.
    """
    return {
        "command": shlex.join(["python", "-m", "benchmarks", command, *argv]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "seeds": list(seeds),
        **describe_machine(),
    }
