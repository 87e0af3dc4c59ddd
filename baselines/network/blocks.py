"""Blocks of a network: modules of several layers that are reconstructed as one."""

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from baselines.network.quantizable import is_quantizable
from baselines.network.trace import Call, Operation, Trace

_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__}


def find_blocks(model: nn.Module, record: Trace) -> list[str]:
    """Names of the blocks of `model` (residual blocks, inverted residuals, transformer blocks...), in calling order.

    A block is a user-defined module with at least two layers to quantize, called once, from one tensor and constants
    to one tensor. Elements of a `Sequential` or `ModuleList` are preferred; one that itself holds two or more such
    elements is a stage, not a block. Outside of these, the innermost candidate that adds two activations (a residual
    block, with whatever blocks are on its branches) or else the innermost candidate is the block.
    """
    modules = dict(model.named_modules())
    layers = {id(modules[name]) for name in record.started if is_quantizable(modules[name])}
    candidates = [name for name in modules if name and _may_be_block(modules[name], record.of(name), layers)]
    stacked = [name for name in candidates if _is_container(modules[name.rpartition(".")[0]])]
    blocks = [name for name in stacked if len(_inside(name, stacked)) < 2]
    blocks = [name for name in blocks if not any(name in _inside(other, blocks) for other in blocks)]
    adding = {operation.owner for operation in record.operations if _adds_activations(operation)}
    residual = [name for name in candidates if name in adding]
    for preferred in (residual, candidates):
        for name in preferred:
            around = any(name == block or name in _inside(block, candidates) for block in blocks)
            if not around and not _inside(name, preferred) and not _inside(name, blocks):
                blocks.append(name)
    return record.order(blocks)


def named_blocks(model: nn.Module, record: Trace, names: Sequence[str]) -> list[str]:
    """`names`, chosen by the user instead of `find_blocks`, in calling order.

    Raises:
        TypeError: not a list of strings.
        ValueError: a name that `model` does not have, one inside of another, no layer to quantize in one, or one
            that is not called once, from one tensor (and constants) to one tensor.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"blocks={names!r} should be a list of module names, such as ['layer1.0', 'layer1.1']")
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            near = difflib.get_close_matches(name, [known for known in modules if known], n=3)
            raise ValueError(
                f"blocks names {name!r}, but {type(model).__name__} has no such module; "
                f"{'close to it: ' + ', '.join(near) if near else 'give names as in model.named_modules()'}"
            )
        inner = [other for other in names if other.startswith(f"{name}.")]
        if inner or list(names).count(name) > 1:
            raise ValueError(
                f"blocks names {name!r} and {(inner or [name])[0]!r}, which overlap; a layer can be in one block only"
            )
        if not any(is_quantizable(modules[n]) and record.of(n) for n in _inside(name, list(modules))):
            raise ValueError(
                f"blocks names {name!r} ({type(modules[name]).__name__}), which holds no layer to quantize; "
                "leave it out: a layer that is in no block is a unit of its own"
            )
        calls = record.of(name)
        if len(calls) != 1 or not calls[0].one_to_one:
            raise ValueError(
                f"blocks names {name!r} ({type(modules[name]).__name__}), which is {_called_how(calls)}; a block is "
                "called once, from one tensor and constants to one tensor: name a module inside of it or around it"
            )
    return record.order(list(names))


def _called_how(calls: list[Call]) -> str:
    if len(calls) != 1:
        return f"called {len(calls)} times"
    if len(calls[0].inputs) != 1:
        return f"called with {len(calls[0].inputs)} tensors"
    if calls[0].arguments is None:
        return "called with further arguments that are no constants, or not the same for all images"
    return "giving something else than one tensor"


def _adds_activations(operation: Operation) -> bool:
    """Whether two activations are added, not an activation and something that all images share."""
    if operation.function not in _ADDITIONS or len(operation.inputs) != 2:
        return False
    first, second = operation.inputs
    return first.shape == second.shape and not any(isinstance(tensor, nn.Parameter) for tensor in operation.inputs)


def _may_be_block(module: nn.Module, calls: list[Call], layers: set[int]) -> bool:
    """`layers` are the identities of all layers that are called."""
    if len(calls) != 1 or not calls[0].one_to_one or id(module) in layers:
        return False
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.TransformerEncoderLayer):
        return False
    # a class of the user's that is a Sequential may be an MLP block, or just a stage of blocks
    parts = module.children() if _is_container(module) else module.modules()
    return sum(id(part) in layers for part in parts) >= 2


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _inside(name: str, names: list[str]) -> list[str]:
    return [other for other in names if other.startswith(f"{name}.")]
