"""One row of the table: quantize, fit the corrections on other training images, score on the test images."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from benchmarks.datasets.data import Dataset, split_calibration
from benchmarks.datasets.images import Images, batches, stacked
from benchmarks.measure.guard import LeakGuard
from benchmarks.measure.pairs import PairedLogits
from benchmarks.networks.quantized import quantized_model
from benchmarks.runs.records import Record
from cat_plugin import CATConfig
from cat_plugin.running.collect import PairedOutputs, collect_outputs

SCORING_BATCH = 256
PAPER_CLUSTERS = 64
DEFAULT_MODE = "cat"
MODES = {"plain_affine": "plain affine", "cat_paper": "CAT (paper)", DEFAULT_MODE: "CAT"}
"""Kinds of correction, and what they are called in tables."""


@dataclass(frozen=True)
class Setting:
    """One cell of the grid."""

    method: str
    w_bits: int
    a_bits: int
    seed: int

    @property
    def name(self) -> str:
        """Readable, unique in a run, and fit for a file name."""
        return f"{self.method}-w{self.w_bits}a{self.a_bits}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What all cells of a run share.

    ``iters`` and ``batch_size`` are those of the reconstruction, ``n_calib`` the training images that quantization
    sees and ``n_cat`` the fresh ones that corrections are fitted on; ``device`` is where the networks run.
    ``features`` names a layer of the low-bit network whose features are collected, too.
    """

    iters: int
    n_calib: int
    n_cat: int
    batch_size: int = 32
    device: str = "cpu"
    features: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of ``results.csv``; top-1 accuracies and ``cat_delta`` (CAT minus low-bit) in percent.

    ``iters`` is what was asked for, also where a method learns nothing. Scores of corrections that were not asked for
    are None, and ``cat_paper_top1`` is where there are fewer images than the paper's 64 clusters.
    """

    dataset: str
    model: str
    method: str
    w_bits: int
    a_bits: int
    seed: int
    iters: int
    n_calib: int
    n_cat: int
    n_eval: int
    fp_top1: float
    lq_top1: float
    plain_affine_top1: float | None
    cat_paper_top1: float | None
    cat_top1: float | None
    cat_delta: float | None


class Measurement(Record[Row]):
    """A row with the predictions of the networks ``fp``, ``lq``, ``plain_affine``, ``cat_paper`` and ``cat``."""

    row_type: ClassVar[type] = Row

    def figures(self) -> dict[str, Any]:
        """``n_eval``, all scores and ``cat_delta``."""
        return _figures(self.predictions)


def measure(
    setting: Setting,
    protocol: Protocol,
    dataset: Dataset,
    model_name: str,
    fp_model: nn.Module,
    modes: Collection[str] = tuple(MODES),
    *,
    cache: Path | None = None,
    cache_device: str = "model",
    progress: bool = False,
) -> Measurement:
    """Quantize ``fp_model`` as ``setting`` says and score it alone and with every correction of ``modes``.

    Training images are split by the setting's seed; the labels of the images that quantization and corrections see
    are not used. Quantized networks are kept in ``cache`` and taken from it; inputs and outputs of units are kept on
    ``cache_device``, ``"model"`` or ``"cpu"``, while one is made.

    Raises:
        BenchmarkError: a test image is among those for quantization or for corrections.
    """
    started = time.perf_counter()
    pairs = paired_logits(
        setting, protocol, dataset, fp_model, cache=cache, cache_device=cache_device, progress=progress
    )
    configs = corrections(protocol.n_cat, setting.seed)
    fitted = {mode: pairs.fit(config) for mode, config in configs.items() if mode in modes}
    predictions = pairs.score(fitted)
    profiles = pairs.profile(fitted[DEFAULT_MODE]) if DEFAULT_MODE in fitted else ()
    row = Row(
        dataset=dataset.name,
        model=model_name,
        **vars(setting),
        iters=protocol.iters,
        n_calib=protocol.n_calib,
        n_cat=protocol.n_cat,
        **_figures(predictions),
    )
    return Measurement(row, predictions, time.perf_counter() - started, profiles)


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
    """Quantize ``fp_model`` as ``setting`` says and run both networks on the images of all parts.

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
        options = {"features": protocol.features, "batch_size": SCORING_BATCH}
        return collect_outputs(quantized, fp_model, batches(images, title if progress else None), **options)

    tuned = outputs(images, "images for quantization")
    fit = outputs(dataset.train_images[cat], "images for corrections")
    test = outputs(dataset.test_images, "test images")
    return PairedLogits(
        **{"fit_q": fit.q, "fit_f": fit.f, "fit_h": fit.h},
        **{"tuned_q": tuned.q, "tuned_f": tuned.f, "tuned_h": tuned.h},
        **{"test_q": test.q, "test_f": test.f, "test_h": test.h},
        labels=dataset.test_labels,
    )


def quantization_options(setting: Setting, protocol: Protocol) -> dict[str, Any]:
    """What ``baselines.quantize`` is asked for."""
    return {**vars(setting), "iters": protocol.iters, "batch_size": protocol.batch_size}


def corrections(n_cat: int, seed: int) -> dict[str, CATConfig]:
    """The corrections that are fitted on ``n_cat`` images, the paper's only where they are enough for it."""
    configs = {
        "plain_affine": CATConfig.paper(num_clusters=1, alpha=1.0, seed=seed),
        "cat_paper": CATConfig.paper(num_clusters=PAPER_CLUSTERS, seed=seed),
        DEFAULT_MODE: CATConfig(seed=seed),
    }
    return {mode: config for mode, config in configs.items() if mode != "cat_paper" or n_cat >= PAPER_CLUSTERS}


def _figures(predictions: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of a row that follow from predictions."""
    labels = predictions["labels"]
    scores = {name: top1(predictions[name], labels) if name in predictions else None for name in ("fp", "lq", *MODES)}
    delta = None if scores["cat"] is None else round(scores["cat"] - scores["lq"], 4)
    return {"n_eval": len(labels), **{f"{name}_top1": score for name, score in scores.items()}, "cat_delta": delta}


def top1(predicted: Tensor, labels: Tensor) -> float:
    """Percentage of ``predicted`` classes ``(N,)`` that are the labels ``(N,)``; 4 decimals."""
    return round(100 * (predicted == labels).double().mean().item(), 4)
