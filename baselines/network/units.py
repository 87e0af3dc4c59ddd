"""Units of a network, which are reconstructed one after the other: blocks, and single layers."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from baselines.network.quantizable import quantizable_layers
from baselines.network.trace import Arguments, Call, Trace

logger = logging.getLogger(__name__)

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh),
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
        arguments: how the network calls it.
        block: name of the block that a layer unit lies in, if any.
        block_arguments: how the network calls that.
    """

    name: str
    layers: tuple[str, ...]
    activation: str | None
    channel_axis: int
    arguments: Arguments
    block: str | None = None
    block_arguments: Arguments | None = None


def find_units(model: nn.Module, record: Trace, blocks: Iterable[str], kind: str) -> list[Unit]:
    """The units of `model` in calling order. `kind` is `"block"` (layers outside of blocks are units of their
    own) or `"layer"`. Layers that are called more than once, never, or otherwise than from one tensor and constants
    to one tensor, belong to no unit."""
    known, blocks = list(blocks), list(blocks) if kind == "block" else []
    layers = record.order(quantizable_layers(model))
    once = [name for name in layers if len(record.of(name)) == 1 and record.of(name)[0].one_to_one]
    members = {block: tuple(name for name in layers if name.startswith(f"{block}.")) for block in blocks}
    members = {block: names for block, names in members.items() if names}
    in_blocks = {name for names in members.values() for name in names}
    members |= {name: (name,) for name in once if name not in in_blocks}
    modules = dict(model.named_modules())
    homes = {name: block for block in known for name in members if name.startswith(f"{block}.")}
    return [_unit(name, members[name], modules, record, homes.get(name)) for name in record.order(list(members))]


def warn_of_repeated(model: nn.Module, record: Trace, units: Iterable[Unit]) -> None:
    """Say which layers of `model` are in none of `units`, and why."""
    known = {layer for unit in units for layer in unit.layers}
    left = [name for name in record.order(quantizable_layers(model)) if name not in known]
    odd = [name for name in left if len(record.of(name)) == 1]
    repeated = [name for name in left if name not in odd]
    if repeated:
        logger.warning(
            "only rounded, not reconstructed, since they are called more than once: %s; name blocks around all of "
            "their calls",
            repeated,
        )
    if odd:
        logger.warning(
            "only rounded, not reconstructed, since they are not called from one tensor and constants to one tensor: "
            "%s; name blocks around them",
            odd,
        )


def per_image(
    units: Iterable[Unit], small: tuple[int, Trace], large: tuple[int, Trace], *, one_row: bool = False
) -> list[Unit]:
    """The `units` whose inputs and outputs have one row, or several, for each image; only these can be reconstructed
    on batches of images.

    Args:
        units: of one network.
        small, large: two numbers of images, and a pass with so many.
        one_row: leave out units with several rows for an image, too, such as layers that see windows of it.
    """

    kept, left = [], []
    for unit in units:
        few, many = (_rows(record.of(unit.name), count) for count, record in (small, large))
        fits = few is not None and few == many and (few[0] == 1 or not one_row)
        (kept if fits else left).append(unit)
    if left:
        logger.warning(
            "only rounded, not reconstructed, since their inputs do not have one row%s for each image: %s; keep the "
            "batch on the first axis, or name blocks around them",
            *("" if one_row else ", or several,", [unit.name for unit in left]),
        )
    return kept


def _rows(calls: list[Call], images: int) -> tuple[object, ...] | None:
    """Rows an image, the same before and behind the unit, and shapes of a row; `None` if that is no whole number, or
    where it was not called."""
    if not calls:
        return None
    before, behind = calls[0].inputs[0].tensor, calls[0].output.tensor
    if len(before) != len(behind) or len(before) % images:
        return None
    return len(before) // images, before.shape[1:], behind.shape[1:]


def _unit(name: str, layers: tuple[str, ...], modules: dict[str, nn.Module], record: Trace, block: str | None) -> Unit:
    axis, last = 1, modules[layers[-1]]
    output = record.of(name)[0].output
    if isinstance(last, nn.Linear) and output is not None:  # whose channels may have been moved behind the batch
        moved = output.tensor.shape[-1] != last.out_features and output.tensor.shape[1] == last.out_features
        axis = 1 if moved else -1
    arguments = record.of(name)[0].arguments
    block_arguments = None if block is None else record.of(block)[0].arguments
    return Unit(name, layers, _activation_behind(name, record), axis, arguments, block, block_arguments)


def _activation_behind(name: str, record: Trace) -> str | None:
    """The activation that alone reads the output of `name`; what just passes the output on does not count."""
    output = record.of(name)[0].output
    readers = [] if output is None else record.readers(output)
    readers = [call for call in readers if not isinstance(call.module, (nn.Identity, nn.Sequential, nn.ModuleList))]
    if len(readers) != 1 or not isinstance(readers[0].module, ACTIVATIONS):
        return None
    if getattr(readers[0].module, "inplace", False):  # others read the output, too, once it was written into
        return None
    return readers[0].name if record.functions_reading(output) <= {readers[0].name} else None
