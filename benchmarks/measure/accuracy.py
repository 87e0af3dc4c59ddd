"""One row of the table: quantize, fit the corrections on other training images, score on the test images."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.datasets.dataset import Dataset
from benchmarks.measure.corrections import DEFAULT_MODE, EARLIER_NAMES, MODES, OUTPUT_MODE, corrections
from benchmarks.measure.network_logits import Corrected, Networks
from benchmarks.measure.paired_logits import PairedLogits, rank_name
from benchmarks.measure.protocol import LowBitNetwork, Protocol, Setting
from benchmarks.runs.row_files import LABELS, Record
from cat_plugin.report.clusters import ClusterProfile

QUANTIZATION = "quantization"
NETWORKS = "fp", "lq", *MODES
"""Of which predictions are stored, as far as they were measured."""


@dataclass(frozen=True, kw_only=True)
class Row(LowBitNetwork):
    """A line of `results.csv`; top-1 and top-5 accuracies and `*_delta` (top-1 with the correction minus low-bit) in
    percent.

    `iters` is what was asked for, also where a method learns nothing. Scores of corrections that were not asked for
    are None, and `cat_paper_top1` is where there are fewer images than the paper's 64 clusters. With two `test_folds`,
    corrections were fitted on `n_cat` images of one half of the test images and scored on the other, in turn.
    `reused_images` of the `n_cat` images had been given to quantization, too. Top-5 is told of many classes.
    """

    seed: int
    iters: int
    n_calib: int
    n_cat: int
    n_eval: int
    fp_top1: float
    lq_top1: float
    plain_affine_top1: float | None
    cat_paper_top1: float | None
    output_top1: float | None
    layers_top1: float | None
    output_delta: float | None
    layers_delta: float | None
    test_folds: int = 1
    reused_images: int = 0
    fp_top5: float | None = None
    lq_top5: float | None = None
    plain_affine_top5: float | None = None
    cat_paper_top5: float | None = None
    output_top5: float | None = None
    layers_top5: float | None = None


class Measurement(Record[Row]):
    """A row with the predictions of the networks `fp`, `lq`, and of every correction, by the names of `MODES`.

    `parts` are the seconds of `quantization` and of the fit of every correction, their mean where there are several.
    """

    row_type: ClassVar[type] = Row

    @staticmethod
    def figures(predictions: dict[str, Tensor]) -> dict[str, Any]:
        """`n_eval`, all scores, and what CAT changes."""
        labels = predictions[LABELS]
        scores = {name: top1(predictions[name], labels) if name in predictions else None for name in NETWORKS}
        deltas = {
            f"{mode}_delta": None if scores[mode] is None else round(scores[mode] - scores["lq"], 4)
            for mode in (OUTPUT_MODE, DEFAULT_MODE)
        }
        figures = {"n_eval": len(labels), **{f"{name}_top1": score for name, score in scores.items()}, **deltas}
        ranked = {name: predictions.get(rank_name(name)) for name in NETWORKS}
        return figures | {f"{name}_top5": None if rank is None else _top5(rank) for name, rank in ranked.items()}

    @classmethod
    def of_earlier(
        cls, values: dict[str, Any], predictions: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """With the names of today; nothing of layers was measured then."""
        if f"{DEFAULT_MODE}_top1" in values:
            return values, predictions
        names = {f"{old}_{what}": f"{new}_{what}" for old, new in EARLIER_NAMES.items() for what in ("top1", "delta")}
        values = {names.get(name, name): value for name, value in values.items()}
        values |= {f"{DEFAULT_MODE}_{what}": None for what in ("top1", "delta")}
        return values, {EARLIER_NAMES.get(name, name): classes for name, classes in predictions.items()}


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
    """Quantize `fp_model` as `setting` says and score it alone and with every correction of `modes`.

    Training images are split by the setting's seed; the labels of the images that quantization and corrections see
    are not used. Quantized networks are kept in `cache` and taken from it; inputs and outputs of units are kept on
    `cache_device`, `"model"` or `"cpu"`, while one is made. Predictions of several folds are pooled.

    Raises:
        BenchmarkError: a test image is among those for quantization or for corrections.
    """
    started = time.perf_counter()
    kept = {"cache": cache, "cache_device": cache_device, "progress": progress}
    networks = Networks.made(setting, protocol, dataset, fp_model, **kept)
    configs = {mode: each for mode, each in corrections(protocol.n_cat, setting.seed).items() if mode in modes}
    folds = networks.folds(protocol.n_cat) if dataset.test_folds > 1 else [networks]
    fits = [{mode: fold.correct(config) for mode, config in configs.items()} for fold in folds]
    scored = []
    for fold, corrected in zip(folds, fits, strict=True):
        logits = {mode: each.logits for mode, each in corrected.items()}
        scored.append(fold.logits.score(logits) | fold.logits.ranks(logits))
    predictions = {name: torch.cat([each[name] for each in scored]) for name in scored[0]}
    row = Row(
        dataset=dataset.name,
        model=model_name,
        **vars(setting),
        iters=protocol.iters,
        n_calib=protocol.n_calib,
        n_cat=protocol.n_cat,
        test_folds=dataset.test_folds,
        reused_images=networks.reused_images,
        **Measurement.figures(predictions),
    )
    parts = {QUANTIZATION: networks.quantization_seconds}
    parts |= {mode: sum(corrected[mode].seconds for corrected in fits) / len(fits) for mode in configs}
    known = {name: round(seconds, 3) for name, seconds in parts.items() if seconds is not None}
    seconds = time.perf_counter() - started
    return Measurement(row, predictions, seconds, _profiles(folds[0].logits, fits[0]), known)


def _profiles(pairs: PairedLogits, corrected: Mapping[str, Corrected]) -> tuple[ClusterProfile, ...]:
    """Of the library's default, or of the default for outputs where that is not there, in the clusters of the latter,
    which are those of the low-bit network's logits."""
    found = [corrected[mode] for mode in (OUTPUT_MODE, DEFAULT_MODE) if mode in corrected]
    return pairs.profile(found[0].correction, found[-1].logits) if found else ()


def top1(predicted: Tensor, labels: Tensor) -> float:
    """Percentage of `predicted` classes `(N,)` that are the labels `(N,)`; 4 decimals."""
    return round(100 * (predicted == labels).double().mean().item(), 4)


def _top5(ranks: Tensor) -> float:
    return round(100 * (ranks < 5).double().mean().item(), 4)
