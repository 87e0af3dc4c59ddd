"""A correction as a folder of two files, `cat_config.json` and `cat.safetensors`, that is loaded as data only."""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cat_plugin.config import CATConfig
from cat_plugin.correction.channel_affine import ChannelAffine
from cat_plugin.correction.module import BUFFERS, REQUIRED, ClusterAffine
from cat_plugin.errors import CATError
from cat_plugin.running.outputs import Output
from cat_plugin.saving.files import replacing
from cat_plugin.saving.fingerprint import Fingerprint
from cat_plugin.saving.names import check_class_names
from cat_plugin.saving.plain import from_plain, to_plain

Report = TypeVar("Report")

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
CONFIG_NAME, TENSORS_NAME = "cat_config.json", "cat.safetensors"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYERS = "layers."
FUNCTIONS = ("get", "set")
"""Stands for `output=(get, set)`, functions, which cannot be saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedLayer:
    """A layer whose output is corrected: its name, the axis of its channels, counted from the last, and their number.

    Its tensors are called `layers.<name>.scale` and `layers.<name>.shift`.
    """

    name: str
    axis: int
    channels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """What `cat_config.json` holds.

    ===============  ============================================================================
    field            meaning
    ===============  ============================================================================
    format_version   of these two files
    library_version  of cat_plugin that wrote them
    tensors_sha256   of the bytes of `cat.safetensors`
    fingerprint      of the quantized model that the correction is for
    output           where its output holds the logits, or `["get", "set"]` for two functions
    layers           whose outputs are corrected, too
    class_names      one for each class, if given
    config, report   how the correction came about, if known
    ===============  ============================================================================
    """

    format_version: int
    library_version: str
    tensors_sha256: str
    fingerprint: Fingerprint
    output: str | int | tuple[str, ...] | None = None
    layers: tuple[SavedLayer, ...] = ()
    class_names: tuple[str, ...] | None = None
    config: CATConfig | None = None
    report: dict | None = None


@dataclasses.dataclass(frozen=True)
class Loaded(Generic[Report]):
    """What a folder holds, checked, for the arguments of `CATWrapper`."""

    correction: ClusterAffine
    report: Report | None
    config: CATConfig | None
    output: Output
    layers: dict[str, ChannelAffine]
    class_names: tuple[str, ...] | None


def save(
    folder: str | os.PathLike,
    model: nn.Module,
    correction: ClusterAffine,
    layers: Mapping[str, ChannelAffine],
    report: Any,
    config: CATConfig | None,
    output: Output,
    class_names: Sequence[str] | None,
) -> None:
    """Writes both files into `folder`, which is made if need be; each is there whole or not at all.

    Raises:
        CATError: `folder` is a file, or `class_names` are not one text a class.
    """
    from cat_plugin import __version__

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CATError(f"{folder} is a file; expected a folder to write {CONFIG_NAME} and {TENSORS_NAME} into")
    buffers = dict(correction.named_buffers())
    for name, part in layers.items():
        buffers |= {f"{LAYERS}{name}.{key}": buffer for key, buffer in part.named_buffers()}
    tensors = {name: buffer.detach().cpu().contiguous() for name, buffer in buffers.items()}
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    saved = Saved(
        format_version=FORMAT_VERSION,
        library_version=__version__,
        tensors_sha256=hashlib.sha256(data).hexdigest(),
        fingerprint=Fingerprint.of(model),
        output=FUNCTIONS if isinstance(output, tuple) else output,
        layers=tuple(SavedLayer(name=name, axis=part.axis, channels=len(part.scale)) for name, part in layers.items()),
        class_names=check_class_names(class_names, correction.num_classes),
        config=config,
        report=None if report is None else to_plain(report),
    )
    text = json.dumps(dataclasses.asdict(saved), indent=2, ensure_ascii=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / TENSORS_NAME) as tensors_file, replacing(folder / CONFIG_NAME) as config_file:
        tensors_file.write_bytes(data)
        config_file.write_bytes(text.encode())


def load(
    folder: str | os.PathLike, model: nn.Module, strict: bool, output: Output, report_type: type[Report]
) -> Loaded[Report]:
    """Reads what `save` wrote, for `model`.

    Args:
        strict: whether another model than the one that it was saved with is an error, or a logged warning.
        output: in place of the saved one, if given.
        report_type: dataclass of the report.

    Raises:
        CATError: there is no such folder or file; a file is damaged, or not the one that the other was saved with; the
            format is unknown; values are of wrong types, shapes, or not finite; or the model is another one.
    """
    folder = _existing(folder)
    saved, report = _read_config(folder / CONFIG_NAME, report_type)
    data = _read(folder / TENSORS_NAME)
    if hashlib.sha256(data).hexdigest() != saved.tensors_sha256:
        raise CATError(
            f"{folder / TENSORS_NAME} is not the file that {CONFIG_NAME} was saved with: it is cut off, changed, or of "
            "another correction; save or copy both again"
        )
    correction, layers = _corrections(data, saved.layers, folder / TENSORS_NAME)
    difference = saved.fingerprint.difference(Fingerprint.of(model))
    if difference is not None:
        message = f"{folder} holds a correction for another quantized model than this {type(model).__name__}"
        if strict:
            raise CATError(
                f"{message}: {difference}; give the model that it was fitted for, or strict=False to use it anyway"
            )
        logger.warning("%s: %s", message, difference)
    if output is None and saved.output is not None:
        if isinstance(saved.output, tuple):
            raise CATError(
                f"{folder} was saved with output=(get, set), functions, which are not saved; give them again"
            )
        output = saved.output
    try:
        class_names = check_class_names(saved.class_names, correction.num_classes)
    except CATError as error:
        raise CATError(f"{folder / CONFIG_NAME}: {error}") from error
    return Loaded(correction, report, saved.config, output, layers, class_names)


def _existing(folder: str | os.PathLike) -> Path:
    try:
        path = Path(folder)
    except TypeError as error:
        raise CATError(f"{folder!r} is a {type(folder).__name__}; expected the path of a local folder") from error
    if not path.exists():
        raise CATError(
            f"{path} does not exist; expected a local folder with {CONFIG_NAME}, since nothing is downloaded"
        )
    if not path.is_dir():
        raise CATError(f"{path} is a file; expected the folder with {CONFIG_NAME} and {TENSORS_NAME}")
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CATError(f"{path} cannot be read ({error.strerror}); save_pretrained writes it") from error


def _read_config(path: Path, report_type: type[Report]) -> tuple[Saved, Report | None]:
    data = _read(path)
    try:
        values = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise CATError(f"{path} is no JSON text ({error}); it is cut off or changed: save or copy it again") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int:
        raise CATError(f"{path} does not say its format_version; expected the file that save_pretrained writes")
    if version != FORMAT_VERSION:
        raise CATError(
            f"{path} is of format {version}, written by cat-plugin {values.get('library_version')}; this version reads "
            f"format {FORMAT_VERSION}: install that one, or save again"
        )
    try:
        saved = from_plain(Saved, values, "the file")
        return saved, None if saved.report is None else from_plain(report_type, saved.report, "the file.report")
    except (CATError, OverflowError) as error:
        raise CATError(f"{path}: {error}") from error


def _corrections(
    data: bytes, layers: tuple[SavedLayer, ...], path: Path
) -> tuple[ClusterAffine, dict[str, ChannelAffine]]:
    try:
        tensors = safetensors.torch.load(data)
        _check_values(tensors)
        of_layers = {layer.name: _layer(tensors, layer) for layer in layers}
        return _output(tensors), of_layers
    except (SafetensorError, ValueError) as error:
        raise CATError(f"{path} holds no correction ({error})") from error


def _layer(tensors: dict[str, Tensor], layer: SavedLayer) -> ChannelAffine:
    """Takes the tensors of `layer` out of `tensors`."""
    names = [f"{LAYERS}{layer.name}.{key}" for key in ("scale", "shift")]
    if not set(names) <= set(tensors):
        raise CATError(f"it lacks {' or '.join(names)}, of a layer that {CONFIG_NAME} has")
    correction = ChannelAffine(*(tensors.pop(name) for name in names), layer.axis)
    if len(correction.scale) != layer.channels:
        raise CATError(f"layer {layer.name!r} has {len(correction.scale)} channels; {CONFIG_NAME} has {layer.channels}")
    return correction


def _output(tensors: dict[str, Tensor]) -> ClusterAffine:
    if not set(REQUIRED) <= set(tensors) <= set(BUFFERS):
        raise CATError(
            f"it has the tensors {sorted(tensors)}; expected {', '.join(REQUIRED)}, and some of {BUFFERS[4:]}"
        )
    if not tensors["bias"].isfinite().any():
        raise CATError("bias has no finite value")
    return ClusterAffine(**tensors)


def _check_values(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CATError(f"{name} is {tensor.dtype}; expected one of {', '.join(map(str, DTYPES))}")
        # Clusters that no image was in have the bias -inf.
        finite = tensor.isfinite() | ((tensor == -torch.inf) & (name == "bias"))
        if not finite.all():
            raise CATError(f"{name} has {int((~finite).sum())} values that are not finite")
