"""Paired logits of the quantized and the full-precision model, in one pass through a loader."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cat_plugin.errors import CATError
from cat_plugin.running.checks import Faults, check_same_shape
from cat_plugin.running.digests import image_digests, known_calibration, output_keys
from cat_plugin.running.inference import inference
from cat_plugin.running.loaders import (
    Batch,
    ForwardFn,
    Loader,
    NoImagesError,
    batch_size_for,
    check_forward,
    find_inputs,
    iterate_inputs,
    num_batches,
    run,
)
from cat_plugin.running.models import check_models, unwrap
from cat_plugin.running.outputs import Output, check_where, extract
from cat_plugin.running.positions import Drawn, PositionDraw
from cat_plugin.running.taps import captured


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the models were given, a tensor or what a `forward_fn` takes, and the positions of its outputs."""

    batch: Any
    drawn: Drawn


@dataclass(frozen=True, eq=False)
class PairedOutputs:
    """Logits of both models for the same images, on the CPU.

    q: (N, C) float32, of the quantized model. f: (N, C) float32, of the full-precision model.
    targets: (N,) int64, or None where the loader has no labels. calibrated: (images,) bool, whether the quantized
    model was calibrated on an image, or None where it does not tell, see `known_calibration`. images: (N,) int64, where
    outputs have positions, which are the N rows then: the image that each belongs to. keys: (images, 2) float64, which
    tell images apart, see `output_keys`; None where every row is one. inputs: of this one batch.
    """

    q: Tensor
    f: Tensor
    targets: Tensor | None = None
    calibrated: Tensor | None = None
    images: Tensor | None = None
    keys: Tensor | None = None
    inputs: Inputs | None = None


def collect_outputs(quantized_model: nn.Module, fp_model: nn.Module, loader: Loader, **options: Any) -> PairedOutputs:
    """The outputs that `feed_outputs` feeds, which has the same options, all together in memory."""
    batches: list[PairedOutputs] = []
    feed_outputs(quantized_model, fp_model, loader, batches.append, **options)
    joined = {}
    for field in fields(PairedOutputs):
        if field.name == "inputs":
            continue
        parts = [getattr(batch, field.name) for batch in batches]
        joined[field.name] = None if any(part is None for part in parts) else torch.cat(parts)
    return PairedOutputs(**joined)


def feed_outputs(
    quantized_model: nn.Module,
    fp_model: nn.Module,
    loader: Loader,
    consume: Callable[[PairedOutputs], None],
    *,
    output: Output = None,
    class_axis: int | None = None,
    positions: int | None = None,
    binary: bool = True,
    forward_fn: ForwardFn | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> None:
    """Runs both models once over `loader` in evaluation mode and hands their logits to `consume`, batch by batch.

    Both models are left as they were found, also when something raises half-way.

    Args:
        loader: see `iterate_inputs`.
        consume: called with the outputs of every batch.
        output: where the outputs hold the logits, if it is not obvious, see `cat_plugin.running.outputs.extract`.
        class_axis: that of the classes where outputs have positions, see `cat_plugin.running.positions.class_axis_of`.
        positions: how many of an image's positions are drawn, with `seed`; None: all.
        binary: whether a single logit is that of the second of two classes, and is given as those.
        forward_fn: how a model is called on a batch, if not on one tensor, see `cat_plugin.running.loaders.ForwardFn`.
        batch_size: into which a loader that is one stacked tensor is cut, see `batch_size_for`.

    Raises:
        CATError: models that cannot be compared, a loader without images, logits that cannot be told, differ in shape,
            or are not finite, and a quantized model whose hooks do not run.
    """
    quantized_model, fp_model = unwrap(quantized_model, "quantized_model"), unwrap(fp_model, "fp_model")
    models = {"quantized_model": quantized_model, "fp_model": fp_model}
    check_models(quantized_model, fp_model)
    check_where(output)
    check_forward(models, forward_fn)
    calibration = known_calibration(quantized_model)
    batch_size = batch_size_for(loader, quantized_model, batch_size)
    draw, total = PositionDraw(class_axis, positions, seed, binary), 0
    with ExitStack() as stack:
        stack.enter_context(inference(models))
        quantized = stack.enter_context(captured(quantized_model, output))
        faults = [Faults(name) for name in models]
        batches = iterate_inputs(loader, batch_size, whole=forward_fn is not None)
        for batch, labels in progress_bar(batches, loader, batch_size, progress, "CAT: collecting logits"):
            returned = run(quantized_model, batch, forward_fn)
            whole_q = quantized.take()
            if forward_fn is not None:
                _check_returned(whole_q, extract(returned, "forward_fn", output, lenient=True))
            drawn = draw(whole_q)
            q = to_cpu(drawn.rows(whole_q))
            returned = run(fp_model, batch, forward_fn)
            whole_f = extract(returned, "fp_model", output, lenient=True)
            check_same_shape({"quantized_model": drawn.shape, "fp_model": whole_f.shape})
            f = to_cpu(drawn.rows(whole_f))
            inputs = batch if forward_fn is None else find_inputs(batch)
            known = None if calibration is None or inputs is None else _known(inputs, calibration)
            for fault, values in zip(faults, (q, f), strict=True):
                fault.look(values)
            images = drawn.images()
            keys = output_keys(drawn.means(whole_q), drawn.means(whole_f)) if drawn.dense else None
            owners = None if images is None else total + images
            consume(PairedOutputs(q, f, drawn.labels(labels), known, owners, keys, Inputs(batch, drawn)))
            total += drawn.shape[0]
    if total == 0:
        raise NoImagesError
    for fault in faults:
        fault.tell()


def progress_bar(
    batches: Iterator[Batch], loader: Loader, batch_size: int, progress: bool, title: str
) -> Iterator[Batch]:
    """`batches`, those of `loader`, with a progress bar if `progress` is true."""
    return tqdm(batches, title, num_batches(loader, batch_size) if progress else None, disable=not progress)


def to_cpu(logits: Tensor) -> Tensor:
    """A copy in float32; models behind CUDA graphs or with preallocated outputs overwrite theirs at the next batch."""
    return logits.detach().to("cpu", torch.float32, copy=True)


def _check_returned(q: Tensor, returned: Tensor) -> None:
    """Raises a `CATError` unless a forward_fn returned what the model gave it, the logits `q`."""
    if returned.shape != q.shape or not torch.allclose(returned.to(q), q, rtol=0, atol=0, equal_nan=True):
        raise CATError(
            "forward_fn returned other logits than quantized_model gave it, and CAT corrects the latter; call the "
            "model once and return its output as it is"
        )


def _known(images: Tensor, calibration: frozenset[str]) -> Tensor:
    """(N,) bool: was the quantized model calibrated on an image, to judge by `calibration`."""
    return torch.tensor([digest in calibration for digest in image_digests(images)], dtype=torch.bool, device="cpu")
