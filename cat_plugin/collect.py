"""Paired logits of the quantized and the full-precision model, in one pass through a loader."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cat_plugin.batches import (
    NO_IMAGES,
    Batch,
    ForwardFn,
    Loader,
    check_forward,
    find_inputs,
    iterate_inputs,
    num_batches,
    run,
)
from cat_plugin.diagnosis import image_digests, known_calibration
from cat_plugin.errors import CATError
from cat_plugin.features import FeatureTap
from cat_plugin.hook import refuse_attached
from cat_plugin.models import check_models, unwrap
from cat_plugin.outputs import Output, check_where, extract
from cat_plugin.preserve import inference


@dataclass(frozen=True, eq=False)
class PairedOutputs:
    """Logits of both models for the same images, on the CPU.

    q: (N, C) float32, of the quantized model. f: (N, C) float32, of the full-precision model.
    targets: (N,) int64, or None where the loader has no labels. h: (N, D) float32 features of a layer of the
    quantized model, or None where none were asked for. calibrated: (N,) bool, whether the quantized model was
    calibrated on an image, or None where it does not tell, see `cat_plugin.diagnosis.known_calibration`.
    """

    q: Tensor
    f: Tensor
    targets: Tensor | None = None
    h: Tensor | None = None
    calibrated: Tensor | None = None


def collect_outputs(quantized_model: nn.Module, fp_model: nn.Module, loader: Loader, **options: Any) -> PairedOutputs:
    """The outputs of `stream_outputs`, which has the same options, all together in memory."""
    batches = list(stream_outputs(quantized_model, fp_model, loader, **options))
    joined = {}
    for field in fields(PairedOutputs):
        parts = [getattr(batch, field.name) for batch in batches]
        joined[field.name] = None if any(part is None for part in parts) else torch.cat(parts)
    return PairedOutputs(**joined)


def stream_outputs(
    quantized_model: nn.Module,
    fp_model: nn.Module,
    loader: Loader,
    *,
    features: str | None = None,
    output: Output = None,
    forward_fn: ForwardFn | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Iterator[PairedOutputs]:
    """Streams `loader` once through both models in evaluation mode and yields their logits, batch by batch.

    See `iterate_inputs` for what a loader can be; `batch_size` is used for one stacked tensor only. `features` names a
    layer of the quantized model whose outputs are given too, averaged over positions; `output` says where the models'
    outputs hold the logits, see `cat_plugin.outputs.extract`, and `forward_fn` how a model is called on a batch, if not
    on one input tensor, see `cat_plugin.batches.ForwardFn`. Both models are left as they were found when the stream
    ends, also when something raises half-way.

    Raises:
        CATError: models that cannot be compared, a loader without images, logits that cannot be told, are not 2-D,
            differ in shape, or are not finite, a quantized model whose hooks do not run, and a layer for features
            that there is not.
    """
    quantized_model, fp_model = unwrap(quantized_model, "quantized_model"), unwrap(fp_model, "fp_model")
    check_models(quantized_model, fp_model)
    check_where(output)
    check_forward({"quantized_model": quantized_model, "fp_model": fp_model}, forward_fn)
    refuse_attached(quantized_model)
    calibration = known_calibration(quantized_model)
    faults = {name: _Faults(name) for name in ("quantized_model", "fp_model", f"layer {features!r}")}
    models, total = {"quantized_model": quantized_model, "fp_model": fp_model}, 0
    with inference(models), _captured(quantized_model) as capture, _tapped(quantized_model, features) as tap:
        batches = iterate_inputs(loader, batch_size, whole=forward_fn is not None)
        for batch, labels in progress_bar(batches, loader, batch_size, progress, "CAT: collecting logits"):
            returned = run(quantized_model, batch, forward_fn)
            q = _to_cpu(extract(capture.take(), "quantized_model", output))
            if forward_fn is not None:
                _check_returned(q, extract(returned, "forward_fn", output, lenient=True))
            f = run_logits(batch, fp_model, "fp_model", output=output, forward_fn=forward_fn)
            check_same_shape({"quantized_model": q, "fp_model": f})
            h = None if tap is None else _to_cpu(tap.take())
            if h is not None and len(h) != len(q):
                raise CATError(
                    f"layer {features!r} gave {len(h)} rows for {len(q)} images (windows or tokens may be rows there); "
                    "name a layer that gives one row an image"
                )
            known, inputs = None, batch if forward_fn is None else find_inputs(batch)
            if calibration is not None and inputs is not None:
                known = torch.tensor([digest in calibration for digest in image_digests(inputs)], dtype=torch.bool)
            for fault, values in zip(faults.values(), (q, f, h), strict=True):
                fault.look(values)
            total += len(q)
            if labels is not None and labels.shape != q.shape[:1]:
                labels = None
            yield PairedOutputs(q, f, labels, h, known)
    if total == 0:
        raise CATError(NO_IMAGES)
    for fault in faults.values():
        fault.tell()


def progress_bar(
    batches: Iterator[Batch], loader: Loader, batch_size: int, progress: bool, title: str
) -> Iterator[Batch]:
    """`batches`, those of `loader`, with a progress bar if `progress` is true."""
    return tqdm(batches, title, num_batches(loader, batch_size) if progress else None, disable=not progress)


def run_logits(
    batch: Any, model: nn.Module, name: str, *, output: Output = None, forward_fn: ForwardFn | None = None
) -> Tensor:
    """Logits (N, C) of `model` for one batch, float32 on the CPU."""
    return _to_cpu(extract(run(model, batch, forward_fn), name, output, lenient=name == "fp_model"))


def check_same_shape(outputs: dict[str, Tensor]) -> None:
    """Raises a `CATError` unless the logits of all models (name -> (N, C)) have the same shape."""
    if len({tensor.shape for tensor in outputs.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in outputs.items())
        raise CATError(f"outputs differ in shape for the same batch: {shapes}; expected the same classes")


def check_finite(logits: Tensor, name: str) -> None:
    """Raises a `CATError` if `logits` (N, C) of the model `name` hold NaN or infinite values."""
    faults = _Faults(name)
    faults.look(logits)
    faults.tell()


def _check_returned(q: Tensor, returned: Tensor) -> None:
    """Raises a `CATError` unless a forward_fn returned what the model gave it, the logits `q`."""
    returned = _to_cpu(returned)
    if returned.shape != q.shape or not torch.allclose(returned, q, rtol=0, atol=0, equal_nan=True):
        raise CATError(
            "forward_fn returned other logits than quantized_model gave it, and CAT corrects the latter; call the "
            "model once and return its output as it is"
        )


class _Faults:
    """Counts NaN and infinite values of the model `name`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._values = self._images = self._total = 0

    def look(self, logits: Tensor | None) -> None:
        if logits is not None:
            bad = ~torch.isfinite(logits)
            self._values += int(bad.sum())
            self._images += int(bad.any(dim=1).sum())
            self._total += len(logits)

    def tell(self) -> None:
        if self._values:
            raise CATError(
                f"{self._name} gave {self._values} NaN or infinite logits, in {self._images} of {self._total} images; "
                "check its scales, and its inputs for values out of range"
            )


class _Capture:
    """Forward hook that keeps the last output."""

    def __init__(self) -> None:
        self._outputs: list[Any] = []

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._outputs = [output]

    def take(self) -> Any:
        if not self._outputs:
            raise CATError(
                "the forward hook on quantized_model never fired for a batch, so CAT could not act on it: its __call__ "
                "bypasses torch.nn.Module.__call__ (for instance by calling forward directly), or forward_fn does not "
                "call the model it is given; override forward instead, or give the module that is really called"
            )
        return self._outputs.pop()


@contextmanager
def _captured(model: nn.Module) -> Iterator[_Capture]:
    capture = _Capture()
    handle = model.register_forward_hook(capture)
    try:
        yield capture
    finally:
        handle.remove()


@contextmanager
def _tapped(model: nn.Module, features: str | None) -> Iterator[FeatureTap | None]:
    if features is None:
        yield None
        return
    tap = FeatureTap(features).attach(model)
    try:
        yield tap
    finally:
        tap.remove()


def _to_cpu(logits: Tensor) -> Tensor:
    # A copy: models behind CUDA graphs or with preallocated outputs overwrite them at the next batch.
    return logits.detach().to("cpu", torch.float32, copy=True)
