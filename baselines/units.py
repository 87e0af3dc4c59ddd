"""Which parts of a network are reconstructed together: blocks found from the module tree, and single layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from baselines.layers import QuantLayer, is_quantizable
from baselines.trace import Call, Trace

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
    elements is a stage, not a block. Outside of these, the innermost candidate is the block.
    """
    modules = dict(model.named_modules())
    candidates = [name for name in modules if name and _may_be_block(modules[name], record.of(name))]
    stacked = [name for name in candidates if _is_container(modules[name.rpartition(".")[0]])]
    blocks = [name for name in stacked if len(_inside(name, stacked)) < 2]
    blocks = [name for name in blocks if not any(name in _inside(other, blocks) for other in blocks)]
    for name in candidates:
        nested = _inside(name, candidates)
        covered = any(name == block or name in _inside(block, candidates) for block in blocks)
        if not nested and not covered:
            blocks.append(name)
    return record.order(blocks)


def find_units(model: nn.Module, record: Trace, blocks: Iterable[str], kind: str) -> list[Unit]:
    """The units of ``model`` in calling order. ``kind`` is ``"block"`` (layers outside of blocks are units of their
    own) or ``"layer"``. Layers that are called more than once, or never, belong to no unit."""
    known, blocks = list(blocks), list(blocks) if kind == "block" else []
    layers = [name for name, module in model.named_modules() if is_quantizable(module) and record.of(name)]
    layers = record.order(layers)
    once = [name for name in layers if len(record.of(name)) == 1]
    members = {block: tuple(name for name in layers if name.startswith(f"{block}.")) for block in blocks}
    in_blocks = {name for names in members.values() for name in names}
    members |= {name: (name,) for name in once if name not in in_blocks}
    modules = dict(model.named_modules())
    homes = {name: block for block in known for name in members if name.startswith(f"{block}.")}
    return [_unit(name, members[name], modules, record, homes.get(name)) for name in record.order(list(members))]


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """All quantized layers of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def _unit(name: str, layers: tuple[str, ...], modules: dict[str, nn.Module], record: Trace, block: str | None) -> Unit:
    axis = -1 if isinstance(modules[layers[-1]], nn.Linear) else 1
    return Unit(name, layers, _activation_behind(name, record), axis, block)


def _activation_behind(name: str, record: Trace) -> str | None:
    """The activation that alone reads the output of ``name``; what just passes the output on does not count."""
    output = record.of(name)[0].output
    readers = [] if output is None else record.readers(output)
    readers = [call for call in readers if not isinstance(call.module, (nn.Identity, nn.Sequential, nn.ModuleList))]
    return readers[0].name if len(readers) == 1 and isinstance(readers[0].module, ACTIVATIONS) else None


def _may_be_block(module: nn.Module, calls: list[Call]) -> bool:
    if _is_container(module) or type(module).__module__.startswith("torch.nn.") or len(calls) != 1:
        return False
    one_to_one = calls[0].simple and calls[0].output is not None
    return one_to_one and sum(is_quantizable(m) for m in module.modules()) >= 2


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _inside(name: str, names: list[str]) -> list[str]:
    return [other for other in names if other.startswith(f"{name}.")]
