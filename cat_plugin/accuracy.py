"""Top-1 and top-5 of the full-precision, the quantized and the corrected model on labelled images."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cat_plugin.batches import ForwardFn, Loader, check_forward, iterate_inputs
from cat_plugin.collect import check_finite, check_same_shape, progress_bar, run_logits
from cat_plugin.errors import CATError
from cat_plugin.hook import uncorrected
from cat_plugin.metrics import PairedStatistics, paired_statistics, percent, top_k_correct
from cat_plugin.models import unwrap
from cat_plugin.outputs import Output, check_where
from cat_plugin.preserve import inference


@dataclasses.dataclass(frozen=True)
class AccuracyReport:
    """Accuracies in percent of the same labelled images, and the paired comparison of CAT with the quantized model.

    `top5` figures count the `top_k = min(5, classes)` largest logits.
    """

    images: int
    top_k: int
    fp_top1: float
    quantized_top1: float
    cat_top1: float
    fp_top5: float
    quantized_top5: float
    cat_top5: float
    paired: PairedStatistics

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        paired = self.paired
        return (
            f"top-1 of {self.images:,} images: FP {self.fp_top1:.2f}, quantized {self.quantized_top1:.2f}, "
            f"with CAT {self.cat_top1:.2f} ({paired.delta:+.2f}, "
            f"95 % CI {paired.ci_low:+.2f} to {paired.ci_high:+.2f}, "
            f"p = {paired.p_value:.2g}, {paired.won} won, {paired.lost} lost); "
            f"top-{self.top_k}: {self.fp_top5:.2f}, {self.quantized_top5:.2f}, {self.cat_top5:.2f}"
        )


def compare_accuracy(
    fp_model: nn.Module,
    quantized_model: nn.Module,
    cat_model: nn.Module,
    loader: Loader,
    *,
    output: Output = None,
    forward_fn: ForwardFn | None = None,
    batch_size: int = 64,
    progress: bool = False,
    seed: int = 0,
) -> AccuracyReport:
    """Runs the three models over a labelled `loader` and compares them on the same images.

    `quantized_model` may be the model that `cat_model` corrects: its plain output is compared. The
    models are left as they were found. `output` says where their outputs hold the logits, if it is not obvious, see
    `cat_plugin.outputs`, and `forward_fn` how a model is called on a batch, see `cat_plugin.batches.ForwardFn`: labels
    are then what a dict has under "labels", or the only part of a tuple, but the first, that can be labels. `seed` is
    that of the bootstrap.

    Raises:
        CATError: the loader yields no images, or no class labels, or labels out of range; outputs
            whose logits cannot be told, are not 2-D and of one shape, or not finite.
    """
    models = {"fp_model": fp_model, "quantized_model": quantized_model, "cat_model": cat_model}
    models = {name: unwrap(model, name) for name, model in models.items()}
    check_where(output)
    check_forward(models, forward_fn)
    top1: list[Tensor] = []
    top5: list[Tensor] = []
    classes = 0
    with inference(models):
        batches = iterate_inputs(loader, batch_size, whole=forward_fn is not None)
        for batch, targets in progress_bar(batches, loader, batch_size, progress, "CAT: comparing accuracy"):
            outputs = _outputs(models, partial(run_logits, batch, output=output, forward_fn=forward_fn))
            images, classes = outputs["fp_model"].shape
            _check_targets(targets, images, classes)
            top1.append(torch.stack([top_k_correct(logits, targets, 1) for logits in outputs.values()]))
            top5.append(torch.stack([top_k_correct(logits, targets, 5) for logits in outputs.values()]))
    correct = torch.cat(top1, dim=1)
    _, quantized, corrected = correct
    return AccuracyReport(
        correct.shape[1],
        min(5, classes),
        *map(percent, correct),
        *map(percent, torch.cat(top5, dim=1)),
        paired_statistics(quantized, corrected, seed),
    )


def _outputs(models: dict[str, nn.Module], logits_of: Callable[[nn.Module, str], Tensor]) -> dict[str, Tensor]:
    """Logits (N, C) of every model for one batch."""
    outputs = {}
    for name, model in models.items():
        with uncorrected(model) if name == "quantized_model" else nullcontext():
            outputs[name] = logits_of(model, name)
    check_same_shape(outputs)
    for name, logits in outputs.items():
        check_finite(logits, name)
    return outputs


def _check_targets(targets: Tensor | None, images: int, classes: int) -> None:
    if targets is None or targets.shape != (images,):
        raise CATError(
            "accuracy needs class labels, and the loader yields none: expected batches of (input, target) or dicts "
            "with a label key, with one integer class an image"
        )
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise CATError(
            f"labels run from {int(targets.min())} to {int(targets.max())}, the models have {classes} classes; "
            "expected labels from 0 to classes - 1"
        )
