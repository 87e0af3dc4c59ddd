"""One row of the table: quantize, fit the corrections on other training images, score on the test images."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from benchmarks.datasets.dataset import Dataset
from benchmarks.measure.corrections import DEFAULT_MODE, MODES, corrections
from benchmarks.measure.network_logits import paired_logits
from benchmarks.measure.protocol import LowBitNetwork, Protocol, Setting
from benchmarks.runs.row_files import Record


@dataclass(frozen=True, kw_only=True)
class Row(LowBitNetwork):
    """A line of `results.csv`; top-1 accuracies and `cat_delta` (CAT minus low-bit) in percent.

    `iters` is what was asked for, also where a method learns nothing. Scores of corrections that were not asked for
    are None, and `cat_paper_top1` is where there are fewer images than the paper's 64 clusters.
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
    cat_top1: float | None
    cat_delta: float | None


class Measurement(Record[Row]):
    """A row with the predictions of the networks `fp`, `lq`, `plain_affine`, `cat_paper` and `cat`."""

    row_type: ClassVar[type] = Row

    @staticmethod
    def figures(predictions: dict[str, Tensor]) -> dict[str, Any]:
        """`n_eval`, all scores and `cat_delta`."""
        labels, networks = predictions["labels"], ("fp", "lq", *MODES)
        scores = {name: top1(predictions[name], labels) if name in predictions else None for name in networks}
        delta = None if scores["cat"] is None else round(scores["cat"] - scores["lq"], 4)
        return {"n_eval": len(labels), **{f"{name}_top1": score for name, score in scores.items()}, "cat_delta": delta}


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
    `cache_device`, `"model"` or `"cpu"`, while one is made.

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
        **Measurement.figures(predictions),
    )
    return Measurement(row, predictions, time.perf_counter() - started, profiles)


def top1(predicted: Tensor, labels: Tensor) -> float:
    """Percentage of `predicted` classes `(N,)` that are the labels `(N,)`; 4 decimals."""
    return round(100 * (predicted == labels).double().mean().item(), 4)
