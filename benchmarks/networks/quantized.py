"""Quantized networks, kept as safetensors files: another look at corrections need not quantize again."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from baselines import quantize
from baselines.files import atomic_path, digest_tensors
from baselines.versions import result_version
from benchmarks import BenchmarkError
from benchmarks.networks.models import load_state
from benchmarks.runs.clock import clock
from benchmarks.runs.environment import quantizing_versions
from benchmarks.runs.files import digest_text, write_text
from benchmarks.wording import bits_name

logger = logging.getLogger(__name__)


def quantized_model(
    fp_model: nn.Module,
    images: Tensor,
    cache: Path | None = None,
    *,
    cache_device: str = "model",
    progress: bool = False,
    **options: Any,
) -> nn.Module:
    """The network of ``timed_quantized_model``."""
    return timed_quantized_model(fp_model, images, cache, cache_device=cache_device, progress=progress, **options)[0]


def timed_quantized_model(
    fp_model: nn.Module,
    images: Tensor,
    cache: Path | None = None,
    *,
    cache_device: str = "model",
    progress: bool = False,
    **options: Any,
) -> tuple[nn.Module, float | None]:
    """``quantize(fp_model, images, **options)``, from ``cache`` where the same call has been made before; and the
    seconds that it took when it was made, None where that is unknown.

    A file is found again only while nothing that quantization depends on has changed: weights, images, options, device,
    library versions and the version of the method's results (`baselines.versions`). An unreadable file is made anew.
    What a stopped call has finished lies in ``cache``, too, and the same call goes on from there.

    Args:
        cache_device: where inputs and outputs of units are kept, ``"model"`` or ``"cpu"``; the result is the same.
        progress: show a progress bar.

    Raises:
        BenchmarkError: ``quantize`` refuses its arguments, or a loss is not finite.
    """
    how = {"cache_device": cache_device, "progress": progress}
    started = clock(images.device)
    if cache is None:
        return _quantize(fp_model, images, **how, **options), clock(images.device) - started
    path = cache / "quantized" / f"{cache_key(fp_model, images, options)}.safetensors"
    seconds_path = cache / "quantized-seconds" / f"{path.stem}.json"
    if path.is_file():
        try:
            # Rounding to nearest costs a pass over the images and makes a network of the same structure.
            network = _quantize(fp_model, images, **(options | {"method": "rtn"}))
            load_state(network, {name: tensor.to(images.device) for name, tensor in load_file(path).items()})
            return network, _stored_seconds(seconds_path)
        except (OSError, SafetensorError, RuntimeError) as error:
            logger.warning("quantizing again, the cached network is unusable: %s", error)
    checkpoint = path.with_suffix(".checkpoint")
    whole, started = not checkpoint.exists(), clock(images.device)
    network = _quantize(fp_model, images, checkpoint=checkpoint, **how, **options)
    seconds = clock(images.device) - started if whole else None
    if seconds is not None:
        write_text(seconds_path, json.dumps({"seconds": seconds}) + "\n")
    with atomic_path(path) as temporary:
        save_file({name: tensor.clone() for name, tensor in network.state_dict().items()}, temporary)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return network, seconds


def _stored_seconds(path: Path) -> float | None:
    """None for networks that were made in several goes, or by versions that kept no time."""
    try:
        return float(json.loads(path.read_text("utf-8"))["seconds"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def cache_key(fp_model: nn.Module, images: Tensor, options: dict[str, Any]) -> str:
    """Digest of everything that the network quantized from ``fp_model`` on ``images`` depends on."""
    inputs = digest_tensors(fp_model.state_dict()), digest_tensors({"images": images})
    environment = repr(
        (type(fp_model).__qualname__, images.device.type, quantizing_versions(), sorted(options.items()))
    )
    return digest_text(*inputs, environment, result_version(options["method"]))


def _quantize(fp_model: nn.Module, images: Tensor, **options: Any) -> nn.Module:
    try:
        return quantize(fp_model, images, **options)
    except (ValueError, FloatingPointError) as error:
        what = f"{options['method']} {bits_name(options['w_bits'], options['a_bits'])}"
        raise BenchmarkError(f"the network cannot be quantized by {what}: {error}") from error
