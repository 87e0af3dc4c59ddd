"""Networks with torchvision's and timm's own weights and transforms of images, or with weights from a file."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models

from benchmarks import BenchmarkError
from benchmarks.networks.catalogue import PREFIXES, is_timm, without_library
from benchmarks.networks.checkpoints import read_state
from benchmarks.networks.models import MODELS, load_read, outputs_in
from benchmarks.networks.named_objects import is_named
from benchmarks.wording import did_you_mean, reason

DEFAULT, RANDOM = "DEFAULT", "random"
NAMES_SHOWN = 3
OPTIONS = {name: {"transform_input": True, "init_weights": False} for name in ("googlenet", "inception_v3")}
"""Of networks that are built in another way where they have weights."""
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
    percent on the 50,000 validation images that `source` states, or None. `code` changes with what a network computes
    that comes from a function of the user's.
    """

    model: nn.Module
    transform: Callable[[Any], Tensor] | None
    source: str
    published: float | None = None
    code: str = ""


def load_pretrained(name: str, weights: str, classes: int, seed: int = 0) -> Pretrained:
    """The named network; with random weights, it has `classes` outputs, else as many as its weights.

    Args:
        name: of `ALL_NETWORKS`, or of timm or torchvision, after its name and a slash.
        weights: `DEFAULT` or another name that torchvision or timm gives to weights, which are downloaded where
            their cache does not hold them; `random` ones; else what `read_state` takes, such as a file. With these,
            images are prepared as for torchvision's first weights (V1) or timm's default ones.
        classes: of the data, as far as is known.
        seed: of the initial weights, which those of a file replace.

    Raises:
        BenchmarkError: no such network or weights, a download that failed, or a file that does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        load = _small if name in MODELS else _from_timm if is_timm(name) else _from_torchvision
        found = load(name, weights, classes)
    found.model.eval()
    return found


def named_outputs(name: str, weights: str) -> int | None:
    """How many outputs the network has with weights that have a name, without downloading them; None of others.

    Raises:
        BenchmarkError: no such network or weights, weights that classify nothing, or timm cannot be imported.
    """
    if name in MODELS:
        return None
    bare = without_library(name)
    if is_timm(name):
        full = _tagged(bare, weights)
        if full is None:
            return None
        outputs = _known_to_timm(bare).get_pretrained_cfg(full).num_classes
        if not outputs:
            raise BenchmarkError(f"timm's {full} has no outputs for classes; give weights of a network that classifies")
        return outputs
    known = get_model_weights(_known_to_torchvision(bare))
    return len(known[weights].meta["categories"]) if weights in known.__members__ else None


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
    bare = without_library(name)
    if is_timm(name):
        return _known_to_timm(bare).create_model(bare, pretrained=False, num_classes=classes)
    return get_model(_known_to_torchvision(bare), weights=None, num_classes=classes, **OPTIONS.get(bare, {}))


def _small(name: str, weights: str, classes: int) -> Pretrained:
    return Pretrained(model=_with_file(name, weights, classes), transform=None, source=weights)


def _from_torchvision(name: str, weights: str, classes: int) -> Pretrained:
    bare = _known_to_torchvision(without_library(name))
    known = get_model_weights(bare)
    if weights not in known.__members__:
        model = _with_file(name, weights, classes, dict.fromkeys([DEFAULT, *known.__members__]))
        return Pretrained(model=model, transform=next(iter(known)).transforms(), source=weights)
    chosen = known[weights]
    return Pretrained(
        model=_with_state(bare, chosen),
        transform=chosen.transforms(),
        source=f"torchvision's {chosen.name} of {bare}",
        published=chosen.meta["_metrics"]["ImageNet-1K"]["acc@1"],
    )


def _with_state(name: str, weights: WeightsEnum) -> nn.Module:
    """As `get_model(name, weights=weights)`, but nothing except tensors is unpickled."""
    options = {"image_size": weights.meta["min_size"][0]} if name.startswith("vit_") else OPTIONS.get(name, {})
    model = get_model(name, weights=None, num_classes=len(weights.meta["categories"]), **options)
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a full disk, a wrong hash, a damaged file in the cache
        raise _failed_download(f"torchvision's {weights.name} of {name}", error) from error
    model.load_state_dict(state)
    return model


def _known_to_torchvision(name: str) -> str:
    known = list_models(module=torchvision.models)
    if name not in known:
        raise BenchmarkError(f"torchvision {torchvision.__version__} has no network {name!r}; {_like(name, known)}")
    return name


def _from_timm(name: str, weights: str, classes: int) -> Pretrained:
    bare = without_library(name)
    timm, full = _known_to_timm(bare), _tagged(bare, weights)
    if full is None:
        model = _with_file(name, weights, classes, [DEFAULT, *_tags(bare)])
        return Pretrained(model=model, transform=timm_transform(f"--model {name}", model), source=weights)
    try:
        model = timm.create_model(full, pretrained=True)
    except Exception as error:  # whatever the hub's client raises
        raise _failed_download(f"timm's {full}", error) from error
    return Pretrained(
        model=model,
        transform=timm_transform(f"--model {name}", model),
        source=f"timm's {full}",
        published=TIMM_TOP1.get(full),
    )


def _tags(bare: str) -> list[str]:
    """Those of the weights that timm has for a network of its own."""
    architecture = bare.partition(".")[0]
    return [each.partition(".")[2] for each in _known_to_timm(bare).list_pretrained(f"{architecture}.*")]


def _tagged(bare: str, weights: str) -> str | None:
    """What timm calls the network with weights that it has; None where they are not timm's."""
    architecture, _, tag = bare.partition(".")
    tags, weights = _tags(bare), tag if tag and weights == DEFAULT else weights
    if tag and tag not in tags:
        raise BenchmarkError(f"timm has no weights {tag!r} of {architecture}; it has {', '.join(tags) or 'none'}")
    if weights == DEFAULT:
        if not tags:
            raise BenchmarkError(f"timm has no weights of {bare}; give them by --weights FILE, or try {RANDOM} ones")
        weights = _known_to_timm(bare).get_pretrained_cfg(architecture).tag
    return f"{architecture}.{weights}" if weights in tags else None


def own_config(model: nn.Module) -> Any:
    """What a network says of its inputs, as timm's do; None where it says nothing."""
    return getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)


def timm_transform(shown: str, model: nn.Module) -> Callable[[Any], Tensor]:
    """What a network's own configuration says, as timm reads it; `shown` is what messages call the network.

    Raises:
        BenchmarkError: timm cannot be imported.
    """
    timm = _timm(shown)
    config = own_config(model)
    config = config if isinstance(config, Mapping) else vars(config)
    return timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config), is_training=False)


def _timm(shown: str) -> Any:
    """It is only imported for networks of its own."""
    try:
        import timm
    except ImportError as error:
        raise BenchmarkError(
            f"{shown} is one of timm's networks, and timm cannot be imported ({error}); "
            "pip install '.[imagenet]' installs it"
        ) from error
    return timm


def names_in_libraries(bare: str) -> list[str]:
    """What `--model` calls the networks that torchvision, or timm where it is installed, calls so."""
    of_timm, of_torchvision = PREFIXES
    found = [f"{of_torchvision}{bare}"] if bare in list_models(module=torchvision.models) else []
    try:
        known = _timm(bare).is_model(bare) and "." not in bare  # any tag is a model to it
    except Exception:  # this is for advice alone
        known = False
    return [*found, f"{of_timm}{bare}"] if known else found


def _known_to_timm(name: str) -> Any:
    """timm itself, which knows the name."""
    timm = _timm(f"--model {name}")
    if not timm.is_model(name):
        raise BenchmarkError(f"timm {timm.__version__} has no network {name!r}; {_like(name, timm.list_models())}")
    return timm


def _like(name: str, known: Sequence[str]) -> str:
    """Those of the known names that are most alike."""
    found = get_close_matches(name, known, NAMES_SHOWN)
    return did_you_mean(found) if found else f"it has {len(known):,} others, such as {known[0]}"


def _with_file(name: str, weights: str, classes: int, known: Collection[str] = ()) -> nn.Module:
    """The network with the weights of a file; `known` are the weights that have names."""
    path = Path(weights)
    if weights != RANDOM and not path.is_file() and not is_named(weights):
        names = f"weights of {name} that have names: {', '.join(known)}; else " if known else ""
        raise BenchmarkError(
            f"no such weights file: {path}; {names}expected a file, PACKAGE:ATTRIBUTE, or {RANDOM} for random ones"
        )
    model = _random(name, classes)
    if weights == RANDOM:
        return model
    state = read_state(path)
    outputs = outputs_in(state, model, classes)
    if outputs != classes:
        model = _random(name, outputs)
    load_read(model, state, path)
    return model


def _failed_download(weights: str, error: Exception) -> BenchmarkError:
    return BenchmarkError(
        f"the weights {weights} could not be downloaded or read ({reason(error)}); download them elsewhere and give "
        "the file by --weights FILE, with --fp-top1 for the accuracy that is to be expected"
    )
