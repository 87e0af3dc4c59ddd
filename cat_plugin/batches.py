"""Model inputs from whatever a user calls a loader, placed where a model wants them."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from cat_plugin.errors import CATError

LABEL_KEYS = ("label", "labels", "target", "targets", "y")
INPUT_KEYS = ("pixel_values", "image", "images", "input", "inputs", "x")
# What a model can compute in; weights of 8 bits are only stored.
COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Loader = Iterable[Any] | Tensor
Batch = tuple[Tensor, Tensor | None]


def iterate_inputs(loader: Loader, batch_size: int = 64) -> Iterator[Batch]:
    """Yields `(inputs, targets)` for every batch, the last partial one included.

    `loader` is an iterable of batches (a DataLoader, a list), each of them a tensor, `(input,)`,
    `(input, target)`, of which further elements are ignored, or a dict; or one stacked tensor of
    images, cut into batches of `batch_size`. `targets` is None unless a batch has one integer label
    an image.

    Raises:
        CATError: the loader holds no image, or a batch has no single input that can be told.
    """
    images = 0
    for batch in _batches(loader, batch_size):
        inputs, targets = _split(batch)
        if inputs.ndim == 0:
            raise CATError("a batch is a tensor without dimensions; expected the images along the first one")
        images += len(inputs)
        yield inputs, _class_labels(targets, len(inputs))
    if images == 0:
        raise CATError("the loader yielded no images; CAT needs at least one, and about a thousand to be of use")


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


def _batches(loader: Loader, batch_size: int) -> Iterable[Any]:
    if isinstance(loader, Tensor):
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise CATError(f"batch_size={batch_size!r} should be an integer >= 1")
        if loader.ndim == 0:
            raise CATError("the loader is a tensor without dimensions; expected images stacked along the first one")
        return loader.split(batch_size) if len(loader) else ()
    if isinstance(loader, tuple | Mapping):
        raise CATError(
            f"the loader is a {type(loader).__name__}, which looks like one batch; pass a list of batches, [batch]"
        )
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise CATError(f"the loader is a {type(loader).__name__}; expected a DataLoader, a list of batches or a tensor")
    return loader


def _split(batch: Any) -> tuple[Tensor, Any]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        return _split_mapping(batch)
    if not isinstance(batch, list | tuple):
        raise CATError(f"a batch is a {type(batch).__name__}; expected a tensor, (input, target) or a dict")
    if not batch or not isinstance(batch[0], Tensor):
        found = ", ".join(type(item).__name__ for item in batch)
        raise CATError(
            f"a batch is a {type(batch).__name__} of ({found}); expected (input, target) or (input,), input a tensor"
        )
    return batch[0], batch[1] if len(batch) > 1 else None


def _split_mapping(batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    targets = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    inputs = {key: value for key, value in batch.items() if key not in LABEL_KEYS and isinstance(value, Tensor)}
    if len(inputs) > 1:
        inputs = {key: value for key, value in inputs.items() if key in INPUT_KEYS}
    if len(inputs) != 1:
        raise CATError(
            f"a batch is a dict with keys {list(batch)}, in which the one input tensor cannot be told; "
            f"name it one of {list(INPUT_KEYS)}"
        )
    return next(iter(inputs.values())), targets


def _class_labels(targets: Any, n_images: int) -> Tensor | None:
    """(n_images,) int64 on the CPU, or None: whatever else comes beside the input is none of our business."""
    if targets is None:
        return None
    try:
        targets = torch.as_tensor(targets).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        return None
    is_class = not targets.is_floating_point() and not targets.is_complex() and targets.dtype != torch.bool
    if not is_class or targets.shape not in ((n_images,), (n_images, 1)):
        return None
    return targets.reshape(n_images).to(torch.int64)
