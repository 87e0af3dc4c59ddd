"""Networks that a function of the user's makes."""

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms._presets import ImageClassification

from benchmarks import BenchmarkError
from benchmarks.networks.models import load_weights
from benchmarks.networks.named_objects import called, named_object
from benchmarks.networks.weights_and_transforms import Pretrained, own_config, timm_transform
from benchmarks.runs.files import digest_text
from benchmarks.wording import lasting

logger = logging.getLogger(__name__)

OPTION = "--model-fn"
EXPECTED = "expected a torch.nn.Module, or a pair of it and a function that makes a tensor (3, H, W) of an RGB image"


def load_from_function(text: str, weights: Path | None, seed: int = 0) -> Pretrained:
    """The network that the function named `text` returns, with other `weights` where these are given.

    Where it returns no transform, images are prepared as the network's own `pretrained_cfg` or `default_cfg` says, as
    timm has it; else in ImageNet's usual way, which the log says.

    Raises:
        BenchmarkError: there is no such function, it fails, or returns something else; or weights do not fit.
    """
    function = named_object(OPTION, text)
    if not callable(function):
        raise BenchmarkError(f"{OPTION} {text} is of type {type(function).__name__}; expected a function")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = called(OPTION, text, function)
    model, transform = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module) or not (transform is None or callable(transform)):
        kinds = [type(each).__name__ for each in (found if isinstance(found, tuple) else (found,))]
        raise BenchmarkError(f"{OPTION} {text} returned {', '.join(kinds)}; {EXPECTED}")
    if weights is not None:
        load_weights(model, weights)
    return Pretrained(
        model=model.eval(),
        transform=transform or _transform_of(model, text),
        source=readable_source(text) if weights is None else str(weights),
        code=digest_text(lasting(model), *_source_codes(function, model)),
    )


def function_name(text: str) -> str:
    """What tables call the network of a function: the function's name."""
    return text.rpartition(":")[2]


def readable_source(text: str) -> str:
    """Where a network is from, alike wherever a file lies."""
    module, _, name = text.rpartition(":")
    return f"those of {name} in {Path(module).name}"


def _transform_of(model: nn.Module, text: str) -> Callable[[Any], Tensor]:
    if own_config(model):
        return timm_transform(f"{OPTION} {text}", model)
    logger.warning(
        "%s %s returns no transform: images are resized to 256, cut to 224 and normalised as usual for ImageNet; "
        "return (network, transform) where the network takes others",
        OPTION,
        text,
    )
    return ImageClassification(crop_size=224)


def _source_codes(function: Callable[[], object], model: nn.Module) -> list[str]:
    """All of the files that a function and the classes of the network's layers are in, wherever they lie: what the
    network computes may change with any line."""
    layers = {kind for layer in model.modules() for kind in type(layer).__mro__}
    files = {_source_file(each) for each in layers} - {None, _source_file(function)}
    return [_text(_source_file(function)), *sorted(map(_text, files))]


def _source_file(code: object) -> str | None:
    try:
        return inspect.getsourcefile(inspect.unwrap(code))
    except (OSError, TypeError):  # compiled code, or a class that was made while the program ran
        return None


def _text(path: str | None) -> str:
    try:
        return Path(path or "").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
