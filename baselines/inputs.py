"""What the user gives, checked: the network, the calibration inputs, whole numbers."""

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset, IterableDataset

from baselines.quantization.layers import quantized_layers

_IMAGE_KEYS = ("pixel_values", "images", "image", "inputs", "input", "x", "data")
_LABEL_KEYS = ("labels", "label", "targets", "target", "y")
_MOST_INPUTS = 2**17
"""That a loader without a length may give: they are all kept in memory, and an endless one should end in an error."""


def check_network(model: nn.Module) -> None:
    """See that `model` is a network in floating point with values that can be used.

    Raises:
        TypeError: no `nn.Module`, or one that is scripted, whose layers cannot be replaced.
        ValueError: it is quantized already, or a parameter or buffer has no data or is not finite; infinite buffers are
            masks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fp_model is a {type(model).__name__}; expected a torch.nn.Module")
    scripted = [
        name or "itself" for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)
    ]
    if scripted:
        raise TypeError(
            f"fp_model, a {type(model).__name__}, is TorchScript ({scripted[0]}), whose layers cannot be replaced; "
            "give the torch.nn.Module that it was scripted or traced from"
        )
    without_data = [name for name, value in _named_values(model) if value.is_meta]
    if without_data:
        raise ValueError(
            f"{type(model).__name__} has {len(without_data)} parameters or buffers on the meta device, such as "
            f"{without_data[0]}, which hold no data; call its to_empty and load its weights first"
        )
    lazy = [name for name, value in _named_values(model) if is_lazy(value)]
    if lazy:
        raise ValueError(
            f"{type(model).__name__} has parameters or buffers that its first batch is to make, such as {lazy[0]}; run "
            "one, and load or train its weights, first"
        )
    if quantized_layers(model):
        raise ValueError(
            f"{type(model).__name__} is quantized already; give the full-precision network that it was made from"
        )
    bad = [name for name, value in model.named_parameters() if not torch.isfinite(value.detach()).all()]
    bad += [name for name, value in model.named_buffers() if torch.isnan(value.detach()).any()]
    if bad:
        raise ValueError(f"{type(model).__name__} holds NaN or infinite values in {', '.join(bad)}; load other weights")


def _named_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def whole_number(name: str, value: object, least: int | None = None) -> int:
    """`value` as an `int`; `name` is for the error.

    Raises:
        ValueError: no integer, or one below `least`.
    """
    number = operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else None
    if number is None or (least is not None and number < least):
        wanted = "an integer" if least is None else f"an integer, at least {least}"
        raise ValueError(f"{name}={value!r} should be {wanted}")
    return number


def gather_inputs(loader: Tensor | Iterable[object]) -> Tensor:
    """All calibration inputs as one tensor (N, ...), on the CPU unless it was given as one tensor.

    Args:
        loader: a stacked tensor, or an iterable (`DataLoader`, list) of batches; a batch is a tensor, a tuple or
            list that starts with one, or a dict with an entry such as `"pixel_values"` or `"image"`, or several of
            these in a list, as NVIDIA DALI gives them. Labels are not used. The last, smaller batch counts.

    Raises:
        TypeError: neither a tensor nor an iterable of batches.
        ValueError: no batch, or no end of them, a batch of another form or with inputs of another shape, or inputs that
            are not finite.
    """
    inputs = loader.detach() if isinstance(loader, Tensor) else _joined(_batches_of(loader))
    if inputs.dim() == 0:
        raise ValueError("the calibration inputs are a tensor without axes; expected (N, ...), N inputs")
    if len(inputs) == 0:
        raise ValueError(f"the calibration set is empty: inputs of shape {tuple(inputs.shape)}")
    if inputs.is_floating_point() and not torch.isfinite(inputs).all():
        bad = int((~torch.isfinite(inputs)).flatten(1).any(1).sum())
        raise ValueError(f"{bad} of {len(inputs)} calibration inputs hold NaN or infinite values")
    return inputs


def _batches_of(loader: object) -> Iterator[Tensor]:
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(
            f"calib_loader is a {type(loader).__name__}, which gives single inputs; wrap it in a DataLoader"
        )
    if isinstance(loader, np.ndarray):
        raise TypeError("calib_loader is a NumPy array; expected a tensor: torch.from_numpy(images)")
    try:
        if isinstance(loader, str | bytes):  # which would give its letters
            raise TypeError
        batches = iter(loader)
    except TypeError:
        raise TypeError(
            f"calib_loader={loader!r} should be a tensor (N, ...) or an iterable of batches, such as a DataLoader"
        ) from None
    return _inputs_of(batches, ends=hasattr(loader, "__len__"))


def _inputs_of(batches: Iterator[object], ends: bool) -> Iterator[Tensor]:
    count = 0
    for batch in batches:
        several = isinstance(batch, (tuple, list)) and batch and all(isinstance(part, Mapping) for part in batch)
        for part in batch if several else (batch,):
            inputs = _input_of(part).detach().to("cpu", copy=True)  # some loaders fill one buffer anew
            count += len(inputs) if inputs.dim() else 0
            yield inputs
        if count > _MOST_INPUTS and not ends:
            raise ValueError(
                f"calib_loader has no length and has given more than {_MOST_INPUTS:,} inputs; if it is endless, cut "
                "it: list(itertools.islice(calib_loader, number_of_batches))"
            )


def _joined(batches: Iterable[Tensor]) -> Tensor:
    batches = list(batches)
    if not batches:
        raise ValueError("the calibration loader is empty; give it at least one batch of inputs")
    shapes = {tuple(batch.shape[1:]) if batch.dim() else None for batch in batches}
    if len(shapes) > 1 or None in shapes:
        raise ValueError(
            f"calibration batches of shapes {sorted({tuple(batch.shape) for batch in batches})[:4]}; expected (n, ...) "
            "with inputs of one shape: resize or crop them in the loader"
        )
    return torch.cat(batches)


def _input_of(batch: object) -> Tensor:
    found = type(batch).__name__
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        found = f"dict with keys {sorted(map(str, batch))}"
        inputs = {key: value for key, value in batch.items() if key not in _LABEL_KEYS}
        known = [inputs[key] for key in _IMAGE_KEYS if key in inputs]
        batch = known[0] if known else next(iter(inputs.values())) if len(inputs) == 1 else None
    if not isinstance(batch, Tensor):
        raise ValueError(
            f"a calibration batch is a {found}; expected a tensor, a tuple that starts with one, or a dict with one "
            f"entry besides the label or one of the keys {', '.join(_IMAGE_KEYS)}"
        )
    return batch
