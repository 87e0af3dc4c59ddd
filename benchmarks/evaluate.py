"""One row of the table: quantize, fit the corrections on other training images, score on the test images."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from baselines.files import atomic_path
from benchmarks.data import Dataset, split_calibration
from benchmarks.files import write_text
from benchmarks.quantized import quantized_model
from cat_plugin import CATConfig, fit_cluster_affine
from cat_plugin.collect import collect_outputs

SCORING_BATCH = 256
PAPER_CLUSTERS = 64
SECONDS = "seconds"  # stands beside the fields of a stored row


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

    def store(self, path: Path) -> None:
        """Write the row as JSON to ``path``, last: where it is, the predictions are beside it, too."""
        with atomic_path(path.with_suffix(".safetensors")) as temporary:
            save_file(self.predictions, temporary)
        write_text(path, json.dumps({**asdict(self.row), SECONDS: self.seconds}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Measurement":
        """Inverse of :meth:`store`."""
        values = json.loads(path.read_text("utf-8"))
        seconds = values.pop(SECONDS, 0.0)
        return cls(Row(**values), load_file(path.with_suffix(".safetensors")), seconds)


@dataclass(frozen=True, eq=False, kw_only=True)
class PairedLogits:
    """Float32 logits of the low-bit network ``q`` and of the full-precision one ``f``, on the CPU.

    ``fit_*`` ``(N, C)`` are of fresh training images, for corrections; ``test_*`` ``(M, C)`` and the int64 ``labels``
    ``(M,)`` are of the test images and only score.
    """

    fit_q: Tensor
    fit_f: Tensor
    test_q: Tensor
    test_f: Tensor
    labels: Tensor


def measure(
    setting: Setting,
    protocol: Protocol,
    dataset: Dataset,
    model_name: str,
    fp_model: nn.Module,
    *,
    cache: Path | None = None,
    cache_device: str = "model",
    progress: bool = False,
) -> Measurement:
    """Quantize ``fp_model`` as ``setting`` says and score it alone and with every correction.

    Training images are split by the setting's seed; the labels of the images that quantization and corrections see
    are not used. Quantized networks are kept in ``cache`` and taken from it; inputs and outputs of units are kept on
    ``cache_device``, ``"model"`` or ``"cpu"``, while one is made.
    """
    started = time.perf_counter()
    pairs = paired_logits(
        setting, protocol, dataset, fp_model, cache=cache, cache_device=cache_device, progress=progress
    )
    logits = {"fp": pairs.test_f, "lq": pairs.test_q}
    for name, config in corrections(protocol.n_cat, setting.seed).items():
        logits[name] = fit_cluster_affine(pairs.fit_q, pairs.fit_f, config)(pairs.test_q)
    predictions = {name: values.argmax(1).to(torch.int16) for name, values in logits.items()}
    predictions["labels"] = dataset.test_labels.to(torch.int16)
    row = _row(setting, protocol, dataset.name, model_name, predictions)
    return Measurement(row, predictions, time.perf_counter() - started)


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
    """Quantize ``fp_model`` as ``setting`` says and run both networks on the images for corrections and for tests."""
    calib, cat = split_calibration(len(dataset.train_images), protocol.n_calib, protocol.n_cat, setting.seed)
    device, options = protocol.device, quantization_options(setting, protocol)
    images = dataset.train_images[calib].to(device)
    quantized = quantized_model(fp_model, images, cache, cache_device=cache_device, progress=progress, **options)
    fit = collect_outputs(quantized, fp_model, dataset.train_images[cat].to(device), batch_size=SCORING_BATCH)
    test = collect_outputs(quantized, fp_model, dataset.test_images.to(device), batch_size=SCORING_BATCH)
    return PairedLogits(fit_q=fit.q, fit_f=fit.f, test_q=test.q, test_f=test.f, labels=dataset.test_labels)


def quantization_options(setting: Setting, protocol: Protocol) -> dict[str, Any]:
    """What ``baselines.quantize`` is asked for."""
    return {**vars(setting), "iters": protocol.iters, "batch_size": protocol.batch_size}


def corrections(n_cat: int, seed: int) -> dict[str, CATConfig]:
    """The corrections that are fitted on ``n_cat`` images, the paper's only where they are enough for it."""
    configs = {"plain_affine": CATConfig.paper(num_clusters=1, alpha=1.0, seed=seed), "cat": CATConfig(seed=seed)}
    if n_cat >= PAPER_CLUSTERS:
        configs["cat_paper"] = CATConfig.paper(num_clusters=PAPER_CLUSTERS, seed=seed)
    return configs


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
