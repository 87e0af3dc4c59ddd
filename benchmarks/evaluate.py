"""One row of the table: quantize, fit the corrections on other training images, score on the test images."""

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.data import Dataset, split_calibration
from benchmarks.quantized import quantized_model
from cat_plugin import CATConfig, fit_cluster_affine
from cat_plugin.collect import collect_outputs

SCORING_BATCH = 256
PAPER_CLUSTERS = 64


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
    """

    iters: int
    n_calib: int
    n_cat: int
    batch_size: int = 32
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of ``results.csv``; top-1 accuracies and ``cat_delta`` (CAT minus low-bit) in percent.

    ``iters`` is what was asked for, also where a method learns nothing; ``cat_paper_top1`` is None where there
    are fewer images than the paper's 64 clusters.
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
    plain_affine_top1: float
    cat_paper_top1: float | None
    cat_top1: float
    cat_delta: float


COLUMNS = tuple(field.name for field in fields(Row))


@dataclass(frozen=True, eq=False)
class Measurement:
    """A row and the predicted classes that it was computed from.

    ``predictions`` holds int16 tensors ``(n_eval,)``: ``labels``, and one for each score of the row (``fp``, ``lq``,
    ``plain_affine``, ``cat_paper``, ``cat``). ``seconds`` is the time it took, 0 where that is unknown.
    """

    row: Row
    predictions: dict[str, Tensor]
    seconds: float = 0.0

    def gain(self) -> Tensor:
        """``(n_eval,)`` float64: 1 where CAT put an image right, -1 where it put one wrong."""
        labels = self.predictions["labels"]
        return (self.predictions["cat"] == labels).double() - (self.predictions["lq"] == labels).double()


def measure(
    setting: Setting,
    protocol: Protocol,
    dataset: Dataset,
    model_name: str,
    fp_model: nn.Module,
    *,
    cache: Path | None = None,
    progress: bool = False,
) -> Measurement:
    """Quantize ``fp_model`` as ``setting`` says and score it alone and with every correction.

    Training images are split by the setting's seed; the labels of the images that quantization and corrections see
    are not used. Quantized networks are kept in ``cache`` and taken from it.
    """
    started = time.perf_counter()
    calib, cat = split_calibration(len(dataset.train_images), protocol.n_calib, protocol.n_cat, setting.seed)
    device, seed = protocol.device, setting.seed
    quantized = quantized_model(
        fp_model,
        dataset.train_images[calib].to(device),
        cache,
        method=setting.method,
        w_bits=setting.w_bits,
        a_bits=setting.a_bits,
        iters=protocol.iters,
        batch_size=protocol.batch_size,
        seed=setting.seed,
        progress=progress,
    )
    fit_q, fit_f = _paired_logits(quantized, fp_model, dataset.train_images[cat].to(device))
    test_q, test_f = _paired_logits(quantized, fp_model, dataset.test_images.to(device))

    logits = {"fp": test_f, "lq": test_q}
    for name, config in corrections(protocol.n_cat, seed).items():
        logits[name] = fit_cluster_affine(fit_q, fit_f, config)(test_q)
    predictions = {name: values.argmax(1).to(torch.int16) for name, values in logits.items()}
    predictions["labels"] = dataset.test_labels.to(torch.int16)
    row = _row(setting, protocol, dataset.name, model_name, predictions)
    return Measurement(row, predictions, time.perf_counter() - started)


def corrections(n_cat: int, seed: int) -> dict[str, CATConfig]:
    """The corrections that are fitted on ``n_cat`` images, the paper's only where they are enough for it."""
    configs = {"plain_affine": CATConfig.paper(num_clusters=1, alpha=1.0, seed=seed), "cat": CATConfig(seed=seed)}
    if n_cat >= PAPER_CLUSTERS:
        configs["cat_paper"] = CATConfig.paper(num_clusters=PAPER_CLUSTERS, seed=seed)
    return configs


def default_is_papers(n_cat: int) -> bool:
    """Whether CAT's default comes to the paper's setting on ``n_cat`` images, so that both fit the same."""
    configs = corrections(n_cat, seed=0)
    settled = {
        name: replace(config, num_clusters=config.clusters_for(n_cat), min_cluster_size=None)
        for name, config in configs.items()
    }
    return settled["cat"] == settled.get("cat_paper")


def _row(
    setting: Setting, protocol: Protocol, dataset_name: str, model_name: str, predictions: dict[str, Tensor]
) -> Row:
    scores = {name: top1(classes, predictions["labels"]) for name, classes in predictions.items() if name != "labels"}
    return Row(
        dataset=dataset_name,
        model=model_name,
        method=setting.method,
        w_bits=setting.w_bits,
        a_bits=setting.a_bits,
        seed=setting.seed,
        iters=protocol.iters,
        n_calib=protocol.n_calib,
        n_cat=protocol.n_cat,
        n_eval=len(predictions["labels"]),
        fp_top1=scores["fp"],
        lq_top1=scores["lq"],
        plain_affine_top1=scores["plain_affine"],
        cat_paper_top1=scores.get("cat_paper"),
        cat_top1=scores["cat"],
        cat_delta=round(scores["cat"] - scores["lq"], 4),
    )


def top1(predicted: Tensor, labels: Tensor) -> float:
    """Percentage of ``predicted`` classes ``(N,)`` that are the labels ``(N,)``; 4 decimals."""
    return round(100 * (predicted == labels).double().mean().item(), 4)


def _paired_logits(quantized: nn.Module, fp_model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    outputs = collect_outputs(quantized, fp_model, images, batch_size=SCORING_BATCH)
    return outputs.q, outputs.f
