"""Model inputs from whatever a user calls a loader, placed where a model wants them."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from cat_plugin.errors import CATError

LABEL_KEYS = ("label", "labels", "target", "targets", "y")
INPUT_KEYS = ("pixel_values", "image", "images", "input", "inputs", "x", "data")
MOST_IMAGES = 2**21
"""That a loader without a length may yield: more than ImageNet has, so that an endless one ends in an error."""
USUAL_BATCH = 64
BATCH_BYTES = 2**22
"""Of a batch of images that a tensor is cut into, for a model on a CPU."""
# What a model can compute in; weights of 8 bits are only stored.
COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

SAY_HOW = (
    "where a model takes other than one tensor, give forward_fn=, a function of (model, batch) that calls the model "
    "and returns its output, such as lambda model, batch: model(**batch)"
)


class NoImagesError(CATError):
    """A loader yielded no images."""

    def __init__(self) -> None:
        super().__init__("the loader yielded no images; CAT needs at least one, and about a thousand to be of use")


Loader = Iterable[Any] | Tensor
Batch = tuple[Any, Tensor | None]

ForwardFn = Callable[[nn.Module, Any], Any]
"""`forward_fn(model, batch)` calls `model` once on what it takes of `batch` and returns the model's output as it is.
`batch` is what the loader yields, with its tensors on the model's device."""


def iterate_inputs(loader: Loader, batch_size: int = 64, *, whole: bool = False) -> Iterator[Batch]:
    """Yields `(inputs, targets)` for every batch, the last partial one included.

    `loader` is an iterable of batches (a DataLoader, a list), each of them a tensor, `(input,)`,
    `(input, target)`, of which further elements are ignored, or a dict; a list of dicts, as NVIDIA DALI
    yields, is as many batches. Or it is one stacked tensor of images, cut into batches of `batch_size`.
    `targets` is None unless a batch has integer labels, one an image, (N,), or one a position of an image,
    (N, ...).

    With `whole`, for a `forward_fn`, batches can be anything and are yielded as they are. Targets are then what a dict
    has under one of `LABEL_KEYS`, or the only part of a tuple or list, but the first, that can be labels (N,).

    Raises:
        CATError: the loader holds no image or has no end, or a batch has no single input that can be told.
    """
    images = 0
    for batch in _batches(loader, batch_size):
        if images > MOST_IMAGES and num_batches(loader) is None:
            raise CATError(
                f"the loader has no length and has yielded more than {MOST_IMAGES:,} images; if it is endless, cut it: "
                "list(itertools.islice(loader, number_of_batches))"
            )
        if whole:
            images += 1
            yield batch, _labels_of(batch)
            continue
        for part in batch if _is_list_of_dicts(batch) else (batch,):
            inputs, targets = _split(part)
            if inputs.ndim == 0:
                raise CATError("a batch is a tensor without dimensions; expected the images along the first one")
            images += len(inputs)
            yield inputs, _class_labels(targets, len(inputs))
    if images == 0:
        raise NoImagesError


def find_inputs(batch: Any) -> Tensor | None:
    """The one input tensor of `batch`, if it can be told."""
    try:
        return _split(batch)[0]
    except CATError:
        return None


def batch_size_for(loader: Loader, model: nn.Module, batch_size: int | None = None) -> int:
    """Into which a `loader` that is one tensor is cut: what is given, or 64, and on a CPU fewer of large images, whose
    outputs would leave its cache."""
    if batch_size is not None:
        _check_batch_size(batch_size)
        return batch_size
    device = model_device(model)
    images = isinstance(loader, Tensor) and loader.ndim > 0 and loader.numel() > 0
    if not images or device is None or device.type != "cpu":
        return USUAL_BATCH
    return min(max(BATCH_BYTES * len(loader) // loader.nbytes, 1), USUAL_BATCH)


def num_batches(loader: Loader, batch_size: int = 64) -> int | None:
    """How many batches `iterate_inputs` will yield, for progress bars; None if it cannot be told."""
    if isinstance(loader, Tensor):
        return -(-len(loader) // batch_size)
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader over an iterable dataset is Sized and has no length
        return None


def model_device(model: nn.Module) -> torch.device | None:
    """Device of the model's first parameter or buffer; None for a model that has none."""
    tensor = next(model.parameters(), None)
    if tensor is None:
        tensor = next(model.buffers(), None)
    return None if tensor is None else tensor.device


def place(inputs: Tensor, model: nn.Module) -> Tensor:
    """`inputs` on the model's device, floating-point inputs in the dtype of its first floating-point parameter."""
    inputs = inputs.to(model_device(model) or inputs.device)
    if not inputs.is_floating_point():
        return inputs
    return inputs.to(next((p.dtype for p in model.parameters() if p.dtype in COMPUTE_DTYPES), inputs.dtype))


def run(model: nn.Module, batch: Any, forward_fn: ForwardFn | None = None) -> Any:
    """What `model` returns for `batch`: one input tensor, or whatever `forward_fn` takes.

    It gets a copy of its own: some models normalise their input in place, and the next is to see it as it was.
    """
    if forward_fn is not None:
        return forward_fn(model, _copied_to(batch, model_device(model)))
    placed = place(batch, model)
    try:
        return model(placed.clone() if placed is batch else placed)
    except Exception as error:
        if hasattr(error, "add_note"):  # of Python 3.11
            error.add_note(
                f"{type(model).__name__} was run on a batch of shape {tuple(placed.shape)}, {placed.dtype}, whose "
                "first axis counts images"
            )
        raise


def check_forward(models: Mapping[str, nn.Module], forward_fn: ForwardFn | None) -> None:
    """Raises a `CATError` unless `models` (name -> module) can be run: by `forward_fn`, or on one input tensor."""
    if forward_fn is not None:
        if not callable(forward_fn):
            raise CATError(
                f"forward_fn is a {type(forward_fn).__name__}; expected a function of (model, batch) that calls the "
                "model and returns its output"
            )
        return
    for name, model in models.items():
        if model._forward_pre_hooks:  # which may add arguments
            continue
        try:
            signature = inspect.signature(model.forward)
        except (TypeError, ValueError):  # not every callable tells
            continue
        try:
            signature.bind(None)
        except TypeError as error:
            raise CATError(
                f"{name} cannot be called with one tensor, {type(model).__name__}.forward{signature} ({error}); "
                f"{SAY_HOW}"
            ) from None


def _copied_to(batch: Any, device: torch.device | None) -> Any:
    """`batch` with copies of its tensors on the device, in lists, tuples and dicts; what else has a method `to` moves
    itself."""
    if isinstance(batch, Tensor):
        return batch.to(batch.device if device is None else device, copy=True)
    if isinstance(batch, MutableMapping):  # asked first, since those of tokenizers move themselves in place
        moved = copy.copy(batch)
        for key, value in batch.items():
            moved[key] = _copied_to(value, device)
        return moved
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_copied_to(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_copied_to(value, device) for value in batch)
    return batch.to(device) if device is not None and callable(getattr(batch, "to", None)) else batch


def _is_list_of_dicts(batch: Any) -> bool:
    return isinstance(batch, list | tuple) and len(batch) > 0 and all(isinstance(part, Mapping) for part in batch)


def _check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise CATError(f"batch_size={batch_size!r} should be an integer >= 1")


def _batches(loader: Loader, batch_size: int) -> Iterable[Any]:
    if isinstance(loader, Tensor):
        _check_batch_size(batch_size)
        if loader.ndim == 0:
            raise CATError("the loader is a tensor without dimensions; expected images stacked along the first one")
        return loader.split(batch_size) if len(loader) else ()
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise CATError(
            f"the loader is a {type(loader).__name__}, a dataset, which gives single images; wrap it in a DataLoader"
        )
    if isinstance(loader, tuple | Mapping):
        raise CATError(
            f"the loader is a {type(loader).__name__}, which looks like one batch; pass a list of batches, [batch]"
        )
    if isinstance(loader, np.ndarray):
        raise CATError("the loader is a NumPy array; expected a tensor: torch.from_numpy(images)")
    iterates = isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
    if not iterates or isinstance(loader, str | bytes):
        raise CATError(f"the loader is a {type(loader).__name__}; expected a DataLoader, a list of batches or a tensor")
    return loader


def _split(batch: Any) -> tuple[Tensor, Any]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        return _split_mapping(batch)
    if not isinstance(batch, list | tuple):
        raise CATError(f"a batch is a {type(batch).__name__}; expected a tensor, (input, target) or a dict; {SAY_HOW}")
    if not batch or not isinstance(batch[0], Tensor):
        found = ", ".join(type(item).__name__ for item in batch)
        raise CATError(
            f"a batch is a {type(batch).__name__} of ({found}); expected (input, target) or (input,), input a tensor; "
            f"{SAY_HOW}"
        )
    return batch[0], batch[1] if len(batch) > 1 else None


def _split_mapping(batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    targets = _value_of_label(batch)
    inputs = {key: value for key, value in batch.items() if key not in LABEL_KEYS and isinstance(value, Tensor)}
    if len(inputs) > 1:
        inputs = {key: value for key, value in inputs.items() if key in INPUT_KEYS}
    if len(inputs) != 1:
        raise CATError(
            f"a batch is a dict with keys {list(batch)}, in which the one input tensor cannot be told; "
            f"name it one of {list(INPUT_KEYS)}; {SAY_HOW}"
        )
    return next(iter(inputs.values())), targets


def _labels_of(batch: Any) -> Tensor | None:
    """Labels in a batch whose inputs only a `forward_fn` knows."""
    if isinstance(batch, Mapping):
        targets = _value_of_label(batch)
        return _class_labels(targets, _length(targets))
    parts = batch[1:] if isinstance(batch, list | tuple) else ()
    found = [_class_labels(part, _length(part)) for part in parts]
    found = [labels for labels in found if labels is not None and labels.ndim == 1]
    return found[0] if len(found) == 1 else None


def _value_of_label(batch: Mapping[str, Any]) -> Any:
    return next((batch[key] for key in LABEL_KEYS if key in batch), None)


def _length(part: Any) -> int:
    return len(part) if isinstance(part, list) or (isinstance(part, Tensor) and part.ndim) else -1


def _class_labels(targets: Any, n_images: int) -> Tensor | None:
    """(n_images, ...) int64 on the CPU, or None: whatever else comes beside the input is none of our business."""
    if targets is None:
        return None
    try:
        targets = torch.as_tensor(targets, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        return None
    is_class = not targets.is_floating_point() and not targets.is_complex() and targets.dtype != torch.bool
    if not is_class or targets.shape[:1] != (n_images,):
        return None
    return (targets.reshape(n_images) if targets.numel() == n_images else targets).to(torch.int64)
