"""Which parts of a network are reconstructed together: blocks found from the module tree, and single layers."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from baselines.network.trace import Call, Operation, Trace
from baselines.quantization.layers import QuantLayer, is_quantizable

logger = logging.getLogger(__name__)

ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Tanh,
    nn.Mish,
)

_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__}


@dataclass(frozen=True)
class Unit:
    """A part of the network that is reconstructed as one.

    Attributes:
        name: of the module, the same in the FP and in the quantized network.
        layers: names of the quantized layers inside (of the module itself for a layer unit), in calling order.
        activation: name of the activation that the output goes straight into, if any. The output is compared behind
            it: what the activation removes need not be reconstructed.
        channel_axis: axis of the output over which the squared error is summed.
        block: name of the block that a layer unit lies in, if any.
    """

    name: str
    layers: tuple[str, ...]
    activation: str | None
    channel_axis: int
    block: str | None = None


def find_blocks(model: nn.Module, record: Trace) -> list[str]:
    """Names of the blocks of ``model`` (residual blocks, inverted residuals, transformer blocks...), in calling order.

    A block is a user-defined module with at least two layers to quantize, called once, from one tensor to one
    tensor. Elements of a ``Sequential`` or ``ModuleList`` are preferred; one that itself holds two or more such
    elements is a stage, not a block. Outside of these, the innermost candidate that adds two activations (a residual
    block, with whatever blocks are on its branches) or else the innermost candidate is the block.
    """
    modules = dict(model.named_modules())
    candidates = [name for name in modules if name and _may_be_block(modules[name], record.of(name))]
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
    """``names``, chosen by the user instead of :func:`find_blocks`, in calling order.

    Raises:
        TypeError: not a list of strings.
        ValueError: a name that ``model`` does not have, one inside of another, no layer to quantize in one, or one
            that is not called once, from one tensor to one tensor.
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
        if len(calls) != 1 or not calls[0].simple or calls[0].output is None:
            raise ValueError(
                f"blocks names {name!r} ({type(modules[name]).__name__}), which is {_called_how(calls)}; a block is "
                "called once, from one tensor to one tensor: name a module inside of it or around it"
            )
    return record.order(list(names))


def _called_how(calls: list[Call]) -> str:
    if len(calls) != 1:
        return f"called {len(calls)} times"
    if not calls[0].simple:
        return f"called with {len(calls[0].inputs)} tensors or further arguments"
    return "giving something else than one tensor"


def _adds_activations(operation: Operation) -> bool:
    """Whether two activations are added, not an activation and something that all images share."""
    if operation.function not in _ADDITIONS or len(operation.inputs) != 2:
        return False
    first, second = operation.inputs
    return first.shape == second.shape and not any(isinstance(tensor, nn.Parameter) for tensor in operation.inputs)


def find_units(model: nn.Module, record: Trace, blocks: Iterable[str], kind: str) -> list[Unit]:
    """The units of ``model`` in calling order. ``kind`` is ``"block"`` (layers outside of blocks are units of their
    own) or ``"layer"``. Layers that are called more than once, or never, belong to no unit."""
    known, blocks = list(blocks), list(blocks) if kind == "block" else []
    layers = record.order(quantizable_layers(model))
    once = [name for name in layers if len(record.of(name)) == 1]
    members = {block: tuple(name for name in layers if name.startswith(f"{block}.")) for block in blocks}
    in_blocks = {name for names in members.values() for name in names}
    members |= {name: (name,) for name in once if name not in in_blocks}
    modules = dict(model.named_modules())
    homes = {name: block for block in known for name in members if name.startswith(f"{block}.")}
    return [_unit(name, members[name], modules, record, homes.get(name)) for name in record.order(list(members))]


def warn_of_repeated(model: nn.Module, record: Trace, units: Iterable[Unit]) -> None:
    """Say which layers of ``model`` are in none of ``units``, since they are called more than once."""
    known = {layer for unit in units for layer in unit.layers}
    left = [name for name in record.order(quantizable_layers(model)) if name not in known]
    if left:
        logger.warning(
            "only rounded, not reconstructed, since they are called more than once: %s; name blocks around all of "
            "their calls",
            left,
        )


def per_image(
    units: Iterable[Unit], small: tuple[int, Trace], large: tuple[int, Trace], *, one_row: bool = False
) -> list[Unit]:
    """The ``units`` whose inputs and outputs have one row, or several, for each image; only these can be reconstructed
    on batches of images.

    Args:
        units: of one network.
        small, large: two numbers of images, and a pass with so many.
        one_row: leave out units with several rows for an image, too, such as layers that see windows of it.
    """

    kept, left = [], []
    for unit in units:
        few, many = (_rows(record.of(unit.name)[0], count) for count, record in (small, large))
        fits = few is not None and few == many and (few[0] == 1 or not one_row)
        (kept if fits else left).append(unit)
    if left:
        logger.warning(
            "only rounded, not reconstructed, since their inputs do not have one row%s for each image: %s; keep the "
            "batch on the first axis, or name blocks around them",
            *("" if one_row else ", or several,", [unit.name for unit in left]),
        )
    return kept


def _rows(call: Call, images: int) -> tuple[object, ...] | None:
    """Rows an image, the same before and behind the unit, and shapes of a row; ``None`` if that is no whole number."""
    before, behind = call.inputs[0].tensor, call.output.tensor
    if len(before) != len(behind) or len(before) % images:
        return None
    return len(before) // images, before.shape[1:], behind.shape[1:]


def quantizable_layers(model: nn.Module) -> list[str]:
    """Names of the layers of a plain network that quantization replaces."""
    return [name for name, module in model.named_modules() if is_quantizable(module)]


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """All quantized layers of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def _unit(name: str, layers: tuple[str, ...], modules: dict[str, nn.Module], record: Trace, block: str | None) -> Unit:
    axis, last = 1, modules[layers[-1]]
    output = record.of(name)[0].output
    if isinstance(last, nn.Linear) and output is not None:  # whose channels may have been moved behind the batch
        moved = output.tensor.shape[-1] != last.out_features and output.tensor.shape[1] == last.out_features
        axis = 1 if moved else -1
    return Unit(name, layers, _activation_behind(name, record), axis, block)


def _activation_behind(name: str, record: Trace) -> str | None:
    """The activation that alone reads the output of ``name``; what just passes the output on does not count."""
    output = record.of(name)[0].output
    readers = [] if output is None else record.readers(output)
    readers = [call for call in readers if not isinstance(call.module, (nn.Identity, nn.Sequential, nn.ModuleList))]
    if len(readers) != 1 or not isinstance(readers[0].module, ACTIVATIONS):
        return None
    return readers[0].name if record.functions_reading(output) <= {readers[0].name} else None


def _may_be_block(module: nn.Module, calls: list[Call]) -> bool:
    if len(calls) != 1 or not calls[0].simple or calls[0].output is None:
        return False
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.TransformerEncoderLayer):
        return False
    # a class of the user's that is a Sequential may be an MLP block, or just a stage of blocks
    parts = module.children() if _is_container(module) else module.modules()
    return sum(is_quantizable(part) for part in parts) >= 2


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _inside(name: str, names: list[str]) -> list[str]:
    return [other for other in names if other.startswith(f"{name}.")]
