"""Paired logits of networks that are quantized here."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from baselines.files import atomic_path, digest_tensors
from benchmarks.datasets.calibration_split import split_calibration
from benchmarks.datasets.dataset import Dataset
from benchmarks.datasets.images import ImageFiles, Images, batches, digests, stacked
from benchmarks.measure.leak_guard import LeakGuard
from benchmarks.measure.paired_logits import PairedLogits, Source
from benchmarks.measure.protocol import Protocol, Setting, quantization_options
from benchmarks.networks.quantized import cache_key, quantized_model
from benchmarks.runs.files import digest_text
from cat_plugin.running.collect import PairedOutputs, collect_outputs

logger = logging.getLogger(__name__)

SCORING_BATCH = 256
LOGITS_FORMAT = "q and f: fresh images, those tuned on, test images"  # changes with what is stored of a network


def paired_logits(
    setting: Setting,
    protocol: Protocol,
    dataset: Dataset,
    fp_model: nn.Module,
    *,
    cache: Path | None = None,
    cache_device: str = "model",
    progress: bool = False,
) -> PairedLogits:
    """Quantize `fp_model` as `setting` says and run both networks on the images of all parts.

    Raises:
        BenchmarkError: a test image is among those for quantization or for corrections.
    """
    calib, cat = split_calibration(len(dataset.train_images), protocol.n_calib, protocol.n_cat, setting.seed)
    guard = LeakGuard(dataset.test_images)
    guard.check(dataset.train_images[calib], "images for quantization")
    guard.check(dataset.train_images[cat], "images for corrections")
    device, options = protocol.device, quantization_options(setting, protocol)
    images = stacked(dataset.train_images[calib]).to(device)
    quantized = quantized_model(fp_model, images, cache, cache_device=cache_device, progress=progress, **options)

    def outputs(images: Images, title: str) -> PairedOutputs:
        loader = batches(images, title if progress else None)
        return collect_outputs(quantized, fp_model, loader, batch_size=SCORING_BATCH)

    parts = {
        "tuned": outputs(images, "images for quantization"),
        "fit": outputs(dataset.train_images[cat], "images for corrections"),
        "test": outputs(dataset.test_images, "test images"),
    }
    logits = {f"{part}_{name}": getattr(found, name) for part, found in parts.items() for name in "qf"}
    return PairedLogits(**logits, labels=dataset.test_labels)


def network_sources(
    grid: Sequence[Setting],
    protocol: Protocol,
    dataset: Dataset,
    model_name: str,
    fp_model: nn.Module,
    cache: Path,
    *,
    cache_device: str = "model",
    progress: bool = False,
) -> list[Source]:
    """`fp_model` quantized in every way of `grid`; to draw from are `protocol.n_cat` training images.

    Networks run once: their logits are kept in `cache` for as long as nothing that they depend on has changed.
    `cache_device` is where a quantization keeps inputs and outputs of units.
    """
    data = dataset.digest()
    found = []
    with tqdm(grid, unit="network", disable=not progress) as bar:
        for setting in bar:
            bar.set_description(setting.name)
            calib, cat = split_calibration(len(dataset.train_images), protocol.n_calib, protocol.n_cat, setting.seed)
            images = stacked(dataset.train_images[calib]).to(protocol.device)
            key = cache_key(fp_model, images, quantization_options(setting, protocol))
            fresh = dataset.train_images[cat]
            # The digest of the data knows training images that are files by their names and sizes alone.
            read = digests(fresh) if isinstance(fresh, ImageFiles) else []
            parts = key, data, digest_tensors({"cat": cat}), LOGITS_FORMAT, *read
            path = cache / "logits" / f"{digest_text(*parts)}.safetensors"
            pairs = _stored(path)
            if pairs is None:
                kept = {"cache": cache, "cache_device": cache_device}
                pairs = paired_logits(setting, protocol, dataset, fp_model, **kept, progress=progress)
                with atomic_path(path) as temporary:
                    save_file(pairs.tensors(), temporary)
            found.append(Source.of(f"{dataset.name}-{model_name}-{setting.name}", pairs, partial(_read, path)))
    return found


def _read(path: Path) -> PairedLogits:
    return PairedLogits(**load_file(path))


def _stored(path: Path) -> PairedLogits | None:
    """The logits in the cache; None where there are none that can be read."""
    if not path.is_file():
        return None
    try:
        return _read(path)
    except (OSError, TypeError, SafetensorError) as error:
        logger.warning("running the networks again, the stored logits are unusable: %s", error)
        return None
