"""The one function that most users need."""

import contextlib
import dataclasses
import hashlib
import logging
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from baselines.files import digest_tensors
from baselines.graphs import GraphNetwork
from baselines.inputs import check_network, gather_inputs, whole_number
from baselines.network.batch_norm_folding import folded_copy
from baselines.network.blocks import find_blocks, named_blocks
from baselines.network.floating_point import unseen_products
from baselines.network.plain_copy import plain_copy
from baselines.network.quantizable import quantizable_layers
from baselines.network.reference_copy import HALF, held_network, holds_half, reference_copy, restore_types
from baselines.network.trace import EXAMPLES, Trace, called_as_recorded, trace
from baselines.network.units import find_units, per_image, warn_of_repeated
from baselines.quantization.convert import quantized_copy, set_activation_ranges
from baselines.quantization.specs import QuantSpec
from baselines.recipes import RECIPES, Recipe
from baselines.reconstruction.cache import Cached, CachePlan, log_cache_size
from baselines.reconstruction.checkpoint import Checkpoint
from baselines.reconstruction.distribution_correction import Corrector
from baselines.reconstruction.engine import reconstruct
from baselines.reconstruction.job import Job, RunSettings
from baselines.summary import summarize
from baselines.versions import ENGINE_VERSION

logger = logging.getLogger(__name__)

METHODS = tuple(RECIPES)
CACHE_DEVICES = ("model", "cpu")

RANGE_IMAGES = 256
_CHECK_IMAGES = 8


def quantize(
    fp_model: nn.Module,
    calib_loader: Tensor | Iterable[object],
    *,
    method: str = "qdrop",
    w_bits: int = 4,
    a_bits: int = 4,
    iters: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    range_method: str = "mse",
    error_weighting: str | None = None,
    blocks: Sequence[str] | None = None,
    cache_device: str = "model",
    cache_dtype: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> nn.Module:
    """Quantize a trained network after training, from unlabelled images; `fp_model` is not touched.

    Args:
        fp_model: the full-precision network, any classification network made of convolutions, linear layers and
            attention; or `nn.DataParallel`, `DistributedDataParallel` or what `torch.compile` gives, which hold one.
            Layers that inherit from torch's keep their own forward pass, computed weights become plain ones.
        calib_loader: calibration inputs: a stacked tensor (N, ...) or an iterable of batches (labels unused).
        method: `"rtn"` (round to nearest), `"adaround"`, `"brecq"`, `"qdrop"` or `"pd_quant"`.
        w_bits, a_bits: bits of weights and activations, 2 to 8, or 32 to leave them in floating point. The weights of
            every layer that reads the images, and weights and input of every layer whose output reaches the network's
            without another layer between, have 8.
        iters: optimiser steps a unit and stage; by default the method's published number (5,000 to 20,000). Fewer
            steps raise the learning rate of the roundings in proportion, so that they still settle.
        batch_size: images a step.
        seed: of everything random; the same seed, machine and versions give the same model (on a GPU as far as its
            convolutions are deterministic, see `torch.use_deterministic_algorithms`).
        range_method: `"mse"` or `"minmax"`.
        error_weighting: how the elements of a unit's error are weighted: `"none"` (all alike) or `"fisher"` (by the
            squared gradients of the predictions, an option of BRECQ); by default as the method's authors do.
        blocks: names of the modules that are reconstructed as one, as in `fp_model.named_modules()`; layers outside
            of them are units of their own. By default, residual and transformer blocks and the like are found.
        cache_device: where inputs and outputs of units are kept between passes: `"model"` (where the network is) or
            `"cpu"`, if they do not fit there; how much it is, is logged. The result is the same.
        cache_dtype: `torch.float16` or `torch.bfloat16` halves what is kept and rounds it; by default nothing is
            rounded.
        checkpoint: a folder, made if it does not exist, that keeps every finished unit. The same call goes on from
            there after a stop, and ends with the same network, bit for bit; once the network is finished, the call
            gives it without another step. The folder may be deleted then.
        progress: show a progress bar.

    Returns:
        A new network of the same class (that of the network inside, where `fp_model` holds one; a plain module that
        runs the graph, where it is a `torch.fx.GraphModule`), device and type, in
        eval mode, without gradients and without the hooks of `fp_model`. Its `state_dict` holds the hardened weights,
        scales, zero points and bits; it loads into networks of the same bits only. A network in half precision,
        or with some layers in it, is made in float32 and rounded at the end to the types that it had, scales too: its
        weights lie beside their grid by as much. What is quantized, and what stays in floating point, says
        `baselines.summarize`. Outputs that are random, by dropout that is left on, stay so, which is logged.

    Raises:
        ValueError: an unknown method or bit width, no calibration inputs, fewer of them than one batch, inputs that
            the network does not take, nothing to quantize, blocks that cannot be used, control flow that depends on
            data and hides a layer, a network that cannot be copied without becoming another one (which module parts),
            gradients that are switched off inside of the network, values that are not finite, an unknown place or type
            of the cache, or a checkpoint of another run.
        OverflowError: values that a cache of float16 cannot hold.
        TypeError: no network, one in TorchScript, no loader, or `blocks` that are not names.
        FloatingPointError: a loss that is not finite during reconstruction (which unit, which step).

    >>> import torch
    >>> from torch import nn
    >>> from baselines import quantize
    >>> fp_model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> network = quantize(fp_model, torch.randn(64, 3, 8, 8), method="rtn", w_bits=4, a_bits=4)
    >>> network(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """
    started = time.perf_counter()
    if method not in RECIPES:
        raise ValueError(f"method={method!r} should be one of {', '.join(METHODS)}")
    recipe = RECIPES[method]
    if error_weighting is not None:
        recipe = dataclasses.replace(recipe, error_weighting=error_weighting)
    spec = QuantSpec(w_bits=w_bits, a_bits=a_bits, range_method=range_method)
    iters = None if iters is None else whole_number("iters", iters, 0)
    batch_size, seed = whole_number("batch_size", batch_size, 1), whole_number("seed", seed)
    if isinstance(fp_model, nn.Module):
        fp_model = held_network(fp_model)
    check_network(fp_model)
    device, dtype = _placement(fp_model)
    plan = _cache_plan(cache_device, cache_dtype, device)
    with _random_state_kept():
        inputs = gather_inputs(calib_loader)
    if recipe.stages and len(inputs) < batch_size:
        raise ValueError(f"{len(inputs)} calibration inputs are fewer than one batch of {batch_size}")
    with _own_context(device), _random_state_kept():
        layout = _layout_for(fp_model, _placed(inputs[:EXAMPLES], device, dtype))
        torch.manual_seed(seed)  # networks that draw in eval mode, too
        settings = RunSettings(iters=iters, batch_size=batch_size, capture_batch_size=max(batch_size, 64))
        cached = Cached(_placed(inputs, plan.device, dtype, layout), plan)
        job = prepare(fp_model, cached, recipe, spec, settings, seed, blocks, layout)
        if checkpoint is not None:
            run = _description(method, job, spec, seed, fp_model)
            job = dataclasses.replace(job, checkpoint=Checkpoint.open(Path(checkpoint), run))
        reconstruct(job, progress=progress)
        _set_layout(job.network, torch.contiguous_format)
        network = job.network
        network.eval()  # some return nothing
        network.requires_grad_(False)
        if holds_half(fp_model):
            restore_types(network, fp_model)
            network.eval()  # what `train(False)` keeps is kept anew, in the types of now
    network.calibration_digests = frozenset(_image_digests(inputs))
    logger.info("quantized %s", summarize(network).headline)
    steps = f"{'published' if iters is None else iters} steps a unit" if recipe.stages else "no reconstruction"
    elapsed = time.perf_counter() - started
    logger.info("%s W%dA%d: %d images, %s, %.1f s", method, w_bits, a_bits, len(inputs), steps, elapsed)
    return network


def _image_digests(images: Tensor) -> list[str]:
    """SHA-256 of the float32 bytes of each image, the first 16 hexadecimal digits: tells others which were used."""
    flat = images.detach().to("cpu", torch.float32).contiguous().reshape(len(images), -1)
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in flat]


def prepare(
    fp_model: nn.Module,
    inputs: Cached,
    recipe: Recipe,
    spec: QuantSpec,
    settings: RunSettings,
    seed: int,
    blocks: Sequence[str] | None = None,
    layout: torch.memory_format = torch.channels_last,
) -> Job:
    """Everything up to reconstruction: the FP twin, the quantized network with its ranges, and the units."""
    generator = torch.Generator(inputs.plan.compute_device).manual_seed(seed)
    example, sample = inputs.batch(0, EXAMPLES), inputs.batch(0, RANGE_IMAGES)
    _say_tied(fp_model)
    folded = folded_copy(fp_model, example, inputs.batch(0, _CHECK_IMAGES))
    _set_layout(folded, layout)
    larger = torch.cat([inputs.batch(EXAMPLES, 2 * EXAMPLES), example, example])[: 2 * EXAMPLES]
    larger_record = _second_trace(folded, larger, needed=bool(recipe.stages))
    record = trace(folded, example).confirmed_by(larger_record)
    record.unseen = unseen_products(folded, example)
    blocks = find_blocks(folded, record) if blocks is None else named_blocks(folded, record, blocks)
    if recipe.unit == "block" and not blocks and any(isinstance(module, GraphNetwork) for module in folded.modules()):
        logger.warning(
            "no blocks are found in the graph of %s, so that its layers are reconstructed one by one; give the network "
            "that it was traced from",
            type(fp_model).__name__,
        )
    units = find_units(folded, record, blocks, recipe.unit)
    if recipe.stages:
        warn_of_repeated(folded, record, units)
        passes = (len(example), record), (len(larger), larger_record)
        units = per_image(units, *passes, one_row=recipe.looks_ahead)
        if recipe.unit == "block":
            logger.info("%d units, %d of them blocks", len(units), len({unit.name for unit in units} & set(blocks)))
        log_cache_size(units, record, len(inputs), inputs.plan, recipe)
    del larger_record
    started = time.perf_counter()
    network = quantized_copy(folded, record, blocks, spec)
    with called_as_recorded(folded, record, quantizable_layers(folded)):
        set_activation_ranges(folded, network, sample, spec, batch_size=settings.batch_size, generator=generator)
    range_seconds = time.perf_counter() - started
    corrector = None
    if recipe.correction is not None:
        unfolded = plain_copy(fp_model, example)
        _set_layout(unfolded, layout)
        corrector = Corrector(unfolded, example, recipe.correction)
    return Job(folded, network, units, inputs, recipe, settings, generator, range_seconds, corrector)


def _second_trace(folded: nn.Module, images: Tensor, *, needed: bool) -> Trace | None:
    """A trace of these images; `None` where the network does not take so many and it is not needed."""
    try:
        return trace(folded, images)
    except Exception:  # the user's code, which may raise anything
        if needed:
            raise
        logger.info("%s does not take %d images", type(folded).__name__, len(images), exc_info=True)
        return None


def _say_tied(model: nn.Module) -> None:
    """Log which weights of layers are one and the same: each layer is rounded for itself."""
    holders: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(name, recurse=False):
            holders.setdefault(parameter, []).append(parameter_name)
    layers = {model.get_submodule(name).weight for name in quantizable_layers(model)}
    tied = [names for parameter, names in holders.items() if len(names) > 1 and parameter in layers]
    if tied:
        logger.warning("tied weights are no longer tied in the quantized network, each is rounded for itself: %s", tied)


def _cache_plan(cache_device: str, cache_dtype: torch.dtype | None, device: torch.device) -> CachePlan:
    if cache_device not in CACHE_DEVICES:
        raise ValueError(f"cache_device={cache_device!r} should be one of {', '.join(CACHE_DEVICES)}")
    if cache_dtype not in (None, *HALF):
        raise ValueError(f"cache_dtype={cache_dtype} should be None or one of {', '.join(map(str, HALF))}")
    return CachePlan(device if cache_device == "model" else torch.device("cpu"), cache_dtype, device)


def _description(method: str, job: Job, spec: QuantSpec, seed: int, fp_model: nn.Module) -> dict[str, object]:
    """All that the quantized network depends on, as JSON types."""
    return {
        "method": method,
        "recipe": repr(job.recipe),
        "engine": ENGINE_VERSION,
        **dataclasses.asdict(spec),
        **dataclasses.asdict(job.settings),
        "seed": seed,
        "cache_dtype": str(job.inputs.plan.dtype),
        "units": [unit.name for unit in job.units],
        "network weights": digest_tensors(_values(fp_model)),
        "network modules": _structure(fp_model),
        "calibration images": digest_tensors({"inputs": job.inputs.tensor}),
        "device": job.generator.device.type,
        "torch": torch.__version__,
    }


def _values(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, also those that a `state_dict` leaves out."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _structure(model: nn.Module) -> str:
    """Digest of which modules there are, by name and class."""
    lines = [f"{name}: {type(module).__module__}.{type(module).__qualname__}" for name, module in model.named_modules()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _placed(
    inputs: Tensor, device: torch.device, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Inputs where and how the engine wants them: images in that layout, nothing in half precision."""
    if inputs.is_floating_point():
        inputs = inputs.to(torch.float32 if dtype in HALF else dtype)
    inputs = inputs.to(device, memory_format=layout if inputs.dim() == 4 else torch.preserve_format)
    return inputs.clone() if inputs.is_inference() else inputs


@torch.no_grad()
def _layout_for(fp_model: nn.Module, example: Tensor) -> torch.memory_format:
    """Channels last, with which convolutions run faster, unless the network takes inputs (N, ...) only without:
    `view` of what a convolution gives needs the other order."""
    network = reference_copy(fp_model)
    _set_layout(network, torch.channels_last)
    try:
        network(_placed(example, example.device, example.dtype, torch.channels_last).clone())
    except Exception:  # the user's code, which may raise anything; if it always does, that is said later
        logger.info("%s does not take channels last", type(fp_model).__name__, exc_info=True)
        return torch.contiguous_format
    return torch.channels_last


def _set_layout(model: nn.Module, layout: torch.memory_format) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=layout)


@contextlib.contextmanager
def _own_context(device: torch.device) -> Iterator[None]:
    """The caller may be inside of `no_grad`, `inference_mode` or `autocast`."""
    with torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Shuffling and augmenting loaders, and networks with dropout that is left on, draw from the global generators;
    these are put back."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating type of the model's parameters."""
    for tensor in model.parameters():
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    raise ValueError(f"{type(model).__name__} has no floating-point parameter, so there is nothing to quantize")
