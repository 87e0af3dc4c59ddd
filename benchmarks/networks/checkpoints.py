"""State_dicts as training leaves them: bare, or in a checkpoint, with prefixes, beside a moving average."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import BenchmarkError
from benchmarks.networks.named_objects import called, is_named, named_object
from benchmarks.wording import reason, some

logger = logging.getLogger(__name__)

HOLDERS = "state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model"
"""Keys under which checkpoints keep weights, a moving average of them first: it is what is evaluated."""
PREFIXES = "module.", "_orig_mod.", "model."
"""Of names, as `DataParallel`, `torch.compile` and Lightning leave them."""
KEYS_SHOWN = 3


def read_state(source: Path) -> Mapping[str, Tensor]:
    """The state_dict of a safetensors file, or of a `torch.save` file that holds tensors only; or `PACKAGE:ATTRIBUTE`:
    the path of such a file, a state_dict, a network, or a function that returns one of these.

    Raises:
        BenchmarkError: no such file, a file that is more than tensors (nothing of it is run), or something other than a
            state_dict.
    """
    held = _read(source) if source.is_file() or not is_named(str(source)) else _named(str(source))
    state = _unwrapped(held, source)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        kind = f"a mapping with the keys {some(held, KEYS_SHOWN)}" if isinstance(held, Mapping) else type(held).__name__
        raise BenchmarkError(f"{source} is not a state_dict, that is names with tensors; it holds {kind}")
    return state


def without_prefixes(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`state` without prefixes that all of its names have and not all of the `wanted` ones."""
    for prefix in PREFIXES:
        if not all(name.startswith(prefix) for name in wanted):
            # An average of torch's counts its updates beside the network.
            rest = {name: value for name, value in state.items() if name != "n_averaged"}
            if rest and all(name.startswith(prefix) for name in rest):
                return without_prefixes({name.removeprefix(prefix): value for name, value in rest.items()}, wanted)
    return state


def _unwrapped(held: object, source: Path) -> object:
    if not isinstance(held, Mapping) or all(isinstance(value, Tensor) for value in held.values()):
        return held
    keys = [key for key in HOLDERS if isinstance(held.get(key), Mapping) and held[key]]
    if not keys:
        return held
    if len(keys) > 1:
        logger.warning("%s holds weights under %s: %s are taken", source, " and ".join(keys), keys[0])
    return _unwrapped(held[keys[0]], source)


def _named(text: str) -> object:
    found = named_object("--weights", text)
    if callable(found) and not isinstance(found, nn.Module):
        found = called("--weights", text, found)
    if isinstance(found, nn.Module):
        return found.state_dict()
    return _read(Path(found)) if isinstance(found, (str, Path)) else found


def _read(path: Path) -> Any:
    if not path.is_file():
        raise BenchmarkError(f"no such weights file: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {reason(error)}") from error
    except Exception as error:  # the two readers raise many types for damaged and for hostile files
        if "TorchScript" in str(error):
            why = "it is a TorchScript program; save the state_dict alone"
        elif "GLOBAL" in str(error):  # what pickle calls a class or a function
            why = "it holds Python objects, none of which is made; save the state_dict alone"
        else:
            why = "it is damaged, or neither safetensors nor written by torch.save"
        raise BenchmarkError(f"{path} is not a readable weights file that holds tensors only: {why}") from error
