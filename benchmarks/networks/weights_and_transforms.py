"""Networks with torchvision's and timm's own weights and transforms of images, or with weights from a file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model, get_model_weights

from benchmarks import BenchmarkError
from benchmarks.networks.catalogue import TIMM, is_timm
from benchmarks.networks.models import MODELS, load_weights
from benchmarks.wording import reason

DEFAULT = "DEFAULT"
# Top-1 in percent, from results/results-imagenet.csv of huggingface/pytorch-image-models, commit 0173a139.
TIMM_TOP1 = {
    "deit_tiny_patch16_224.fb_in1k": 72.172,
    "deit_small_patch16_224.fb_in1k": 79.844,
    "deit_base_patch16_224.fb_in1k": 81.992,
    "vit_small_patch16_224.augreg_in21k_ft_in1k": 81.384,
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": 75.454,
    "regnetx_006.pycls_in1k": 73.868,
}


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A network in eval mode, the transform that makes its inputs `(3, H, W)` of RGB images, and where it is from.

    The small networks take images as they are in memory, so their `transform` is None. `published` is the top-1 in
    percent on the 50,000 validation images that `source` states, or None.
    """

    model: nn.Module
    transform: Callable[[Any], Tensor] | None
    source: str
    published: float | None = None


def load_pretrained(name: str, weights: str, classes: int, seed: int = 0) -> Pretrained:
    """The named network with `classes` outputs.

    Args:
        name: of `ALL_NETWORKS`, or of timm.
        weights: `DEFAULT` or another name that torchvision or timm gives to weights, which are downloaded where
            their cache does not hold them; else a file with a state_dict. With a file, images are prepared as for
            torchvision's first weights (V1) or timm's default ones.
        classes: of the data; named weights have theirs.
        seed: of the initial weights, which those of a file replace.

    Raises:
        BenchmarkError: no such network or weights, weights for another number of classes, a download that failed, or
            a file that does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        load = _small if name in MODELS else _from_timm if is_timm(name) else _from_torchvision
        found = load(name, weights, classes)
    found.model.eval()
    return found


def untrained(name: str, classes: int, seed: int = 0) -> nn.Module:
    """The named network with random weights, in eval mode.

    Raises:
        BenchmarkError: no such network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _random(name, classes).eval()


def _random(name: str, classes: int) -> nn.Module:
    if name in MODELS:
        return MODELS[name](classes)
    if is_timm(name):
        return _known_to_timm(name).create_model(name, pretrained=False, num_classes=classes)
    return get_model(name, weights=None, num_classes=classes)


def _small(name: str, weights: str, classes: int) -> Pretrained:
    return Pretrained(model=_with_file(name, weights, classes), transform=None, source=weights)


def _from_torchvision(name: str, weights: str, classes: int) -> Pretrained:
    known = get_model_weights(name)
    if weights not in known.__members__:
        model = _with_file(name, weights, classes, [DEFAULT, *known.__members__])
        return Pretrained(model=model, transform=next(iter(known)).transforms(), source=weights)
    chosen = known[weights]
    _refuse_other_classes(f"{name} {chosen.name}", len(chosen.meta["categories"]), classes)
    return Pretrained(
        model=_with_state(name, chosen),
        transform=chosen.transforms(),
        source=f"torchvision's {chosen.name} of {name}",
        published=chosen.meta["_metrics"]["ImageNet-1K"]["acc@1"],
    )


def _with_state(name: str, weights: WeightsEnum) -> nn.Module:
    """As `get_model(name, weights=weights)`, but nothing except tensors is unpickled."""
    options = {"image_size": weights.meta["min_size"][0]} if name.startswith("vit_") else {}
    model = get_model(name, weights=None, num_classes=len(weights.meta["categories"]), **options)
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a full disk, a wrong hash, a damaged file in the cache
        raise _failed_download(f"torchvision's {weights.name} of {name}", error) from error
    model.load_state_dict(state)
    return model


def _from_timm(name: str, weights: str, classes: int) -> Pretrained:
    timm = _known_to_timm(name)
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{name}.*")]
    if weights != DEFAULT and weights not in tags:
        model = _with_file(name, weights, classes, [DEFAULT, *tags])
        return Pretrained(model=model, transform=_timm_transform(timm, model), source=weights)
    full = f"{name}.{timm.get_pretrained_cfg(name).tag if weights == DEFAULT else weights}"
    _refuse_other_classes(full, timm.get_pretrained_cfg(full).num_classes, classes)
    try:
        model = timm.create_model(full, pretrained=True)
    except Exception as error:  # whatever the hub's client raises
        raise _failed_download(f"timm's {full}", error) from error
    return Pretrained(
        model=model,
        transform=_timm_transform(timm, model),
        source=f"timm's {full}",
        published=TIMM_TOP1.get(full),
    )


def _timm_transform(timm: Any, model: nn.Module) -> Callable[[Any], Tensor]:
    return timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)


def _known_to_timm(name: str) -> Any:
    """timm itself, which knows the name; it is only imported for networks of its own."""
    try:
        import timm
    except ImportError as error:
        raise BenchmarkError(
            f"--model {name} is one of timm's networks, and timm cannot be imported ({error}); "
            "pip install '.[imagenet]' installs it"
        ) from error
    if not timm.is_model(name):
        raise BenchmarkError(f"timm {timm.__version__} has no network {name!r}; choose from {', '.join(TIMM)}")
    return timm


def _with_file(name: str, weights: str, classes: int, known: Sequence[str] = ()) -> nn.Module:
    """The network with the weights of a file; `known` are the weights that have names."""
    path, model = Path(weights), _random(name, classes)
    if known and not path.is_file():
        raise BenchmarkError(f"no such weights file: {path}; weights of {name} that have names: {', '.join(known)}")
    load_weights(model, path)
    return model


def _refuse_other_classes(weights: str, outputs: int, classes: int) -> None:
    if outputs != classes:
        raise BenchmarkError(
            f"the weights {weights} have {outputs:,} outputs, the data {classes:,} class folders; give all of "
            "ImageNet's, or --weights FILE of a network for these classes"
        )


def _failed_download(weights: str, error: Exception) -> BenchmarkError:
    return BenchmarkError(
        f"the weights {weights} could not be downloaded or read ({reason(error)}); download them elsewhere and give "
        "the file by --weights FILE, with --fp-top1 for the accuracy that is to be expected"
    )
