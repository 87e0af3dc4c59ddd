"""What users give as a model: the module inside of it, and whether two of them can be compared."""

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cat_plugin.errors import CATError
from cat_plugin.running.tensors import named_tensors, storage_leaves

WRAPPED = ("model", "module")
CONTAINERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
"""Torch's modules that hold a network and call it, by the name of the class, since that of compiled ones is private."""


def unwrap(model: Any, name: str) -> nn.Module:
    """`model`, the argument `name`, itself, or the module inside of a wrapper that is none, such as AIMET's
    `QuantizationSimModel`.

    Raises:
        CATError: `model` is no module and does not hold exactly one as `model` or `module`; or it is to be corrected
            and is TorchScript, which takes no hooks.
    """
    if isinstance(model, torch.jit.ScriptModule) and name == "quantized_model":
        raise CATError(
            f"{name} is TorchScript ({type(model).__name__}), which takes no hooks; give it inside of a module that "
            "does, torch.nn.Sequential(model), and call that from then on"
        )
    if isinstance(model, nn.Module):
        return model
    inner = {attribute: getattr(model, attribute, None) for attribute in WRAPPED}
    found = {attribute: value for attribute, value in inner.items() if isinstance(value, nn.Module)}
    if len({id(value) for value in found.values()}) == 1:
        return next(iter(found.values()))
    if found:
        raise CATError(
            f"{name} is a {type(model).__name__}, which holds a torch.nn.Module as {' and another as '.join(found)}; "
            "give the one that is called"
        )
    raise CATError(
        f"{name} is a {type(model).__name__}; expected a torch.nn.Module, or a wrapper that holds one as "
        f"{' or '.join(WRAPPED)}"
    )


def inside(model: nn.Module) -> tuple[nn.Module, str]:
    """The network that `nn.DataParallel`, `DistributedDataParallel` or what `torch.compile` gives holds, and what
    stands before its names in those of `model`; `model` itself and nothing where it is none of these."""
    prefix = ""
    while (name := _held_as(model)) is not None:
        model, prefix = getattr(model, name), f"{prefix}{name}."
    return model, prefix


def is_compiled(model: nn.Module) -> bool:
    """Whether `model` is what `torch.compile` gives."""
    return _held_as(model) == CONTAINERS["OptimizedModule"]


def _held_as(model: nn.Module) -> str | None:
    return CONTAINERS.get(type(model).__name__) if type(model).__module__.startswith("torch.") else None


def check_models(quantized_model: nn.Module, fp_model: nn.Module) -> None:
    """Raises a `CATError` unless the two are different modules that share no memory, with weights that are made."""
    if quantized_model is fp_model:
        raise CATError(
            "quantized_model and fp_model are the same object; if quantization works in place, "
            "quantize a copy.deepcopy of the full-precision model"
        )
    for name, model in (("quantized_model", quantized_model), ("fp_model", fp_model)):
        lazy = [path for path, tensor in named_tensors(model) if is_lazy(tensor)]
        if lazy:
            raise CATError(
                f"{name} has parameters or buffers that its first batch is to make, such as {lazy[0]!r}; run one, and "
                "load or train its weights, first"
            )
    fp_storages = {storage for storages in _storages(fp_model).values() for storage in storages}
    shared = [name for name, storages in _storages(quantized_model).items() if storages & fp_storages]
    if shared:
        raise CATError(
            f"quantized_model shares {len(shared)} of its parameters and buffers with fp_model, such as {shared[0]!r}: "
            "quantization may have changed the full-precision model in place; quantize a copy.deepcopy of it"
        )


def _storages(model: nn.Module) -> dict[str, set[tuple[torch.device, int]]]:
    """The allocations that each parameter and buffer lives in; equal ones mean views of the same memory.

    Left out are tensors without memory, and buffers of one number, which may be a constant of the library.
    """
    return {
        name: {
            (leaf.device, leaf.untyped_storage().data_ptr())
            for leaf in storage_leaves(tensor)
            # Asked first, since sparse tensors and some subclasses have no storage to ask.
            if leaf.layout == torch.strided and leaf.data_ptr() != 0
        }
        for name, tensor in named_tensors(model)
        if isinstance(tensor, nn.Parameter) or tensor.numel() > 1
    }
