"""A private copy of a network with its batch norms folded into the layers before them."""

import copy
import logging

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from baselines.network.comparison import check_same_network, same_outputs, warn_of_random_outputs
from baselines.network.layer_subclasses import trials
from baselines.network.plain_copy import first_pass, made_plain, replace_module
from baselines.network.quantizable import is_quantizable
from baselines.network.reference_copy import hooked_modules, reference_copy
from baselines.network.trace import Call, Trace, trace

logger = logging.getLogger(__name__)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def folded_copy(model: nn.Module, example: Tensor, images: Tensor | None = None) -> nn.Module:
    """A plain copy of `model` (`plain_copy`) with batch norm folded.

    A batch norm is folded into the convolution or linear layer whose output it alone reads, if that scales with the
    layer's weight; others stay. Of the norms with an activation inside that timm has, the activation stays as a module
    of its own.

    Args:
        model: the user's network, which stays as it is.
        example: inputs (N, ...) that show how it computes.
        images: inputs on which the copy is compared with the network, by default `example`.

    Raises:
        ValueError: as `plain_copy`, or the copy gives other outputs than the network.
    """
    hooked = hooked_modules(model)
    if hooked:
        logger.warning("hooks are not taken over, whether or not they change what the network computes: %s", hooked)
    reference = reference_copy(model)
    first_pass(reference, model, example)
    warn_of_random_outputs(reference, example)
    folded, layers = _folded(made_plain(reference, example), example)
    check_same_network(reference, folded, example if images is None else images, layers)
    return folded


def _folded(twin: nn.Module, example: Tensor) -> tuple[nn.Module, list[str]]:
    """`twin` with batch norm folded where outputs stay the same, and names of the layers that took one in."""
    record = trace(twin, example)
    scaling = {name: trial.scales for name, trial in trials(twin, example).items()}
    pairs = [(call.name, _foldable_source(call, record)) for call in record.calls]
    pairs = [(norm, layer) for norm, layer in pairs if layer is not None and scaling.get(layer, True)]
    folded = _with_folded(twin, pairs)
    if same_outputs(twin, folded, example):
        return folded, [layer for _, layer in pairs]
    absorbing = []
    for norm, layer in pairs:  # some layer's output is also read by a function: find it
        folded = _with_folded(twin, [(norm, layer)])
        if same_outputs(twin, folded, example):
            twin = folded
            absorbing.append(layer)
        else:
            kind = type(twin.get_submodule(norm))
            reason = f"the output of {layer} is used elsewhere, too" if kind in BATCH_NORMS else "its class does more"
            logger.warning("batch norm %s (%s) stays: %s", norm, kind.__name__, reason)
    return twin, absorbing


def _foldable_source(norm: Call, record: Trace) -> str | None:
    """The name of the layer that `norm` can be folded into, if it is a batch norm and there is one."""
    if not isinstance(norm.module, BATCH_NORMS) or norm.module.running_mean is None:
        return None
    value = norm.inputs[0]
    makers = [call for call in record.calls if is_quantizable(call.module) and value.same(call.output)]
    if len(makers) != 1 or any(len(record.of(name)) != 1 for name in (norm.name, makers[0].name)):
        return None
    if isinstance(makers[0].module, nn.Linear) and value.tensor.dim() != 2:
        return None  # batch norm works on axis 1, the linear layer on the last one
    others = [c for c in record.readers(value) if c.name != norm.name and c.name not in norm.parents]
    return None if others else makers[0].name


def _with_folded(model: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    """A copy of `model` in which each batch norm (first name) is folded into its layer (second name)."""
    twin = copy.deepcopy(model)
    for norm_name, layer_name in pairs:
        norm, layer = twin.get_submodule(norm_name), twin.get_submodule(layer_name)
        fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        gain = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
        fused = fuse(layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, gain, shift)
        layer.weight, layer.bias = (nn.Parameter(part.detach(), requires_grad=False) for part in fused)
        replace_module(twin, norm_name, _behind_norm(norm))
    return twin


def _behind_norm(norm: nn.Module) -> nn.Module:
    """What is left of a module when its batch norm has been folded."""
    parts = [getattr(norm, name, None) for name in ("drop", "act")]  # as timm's BatchNormAct2d calls them
    return nn.Sequential(*parts) if all(isinstance(part, nn.Module) for part in parts) else nn.Identity()
