"""Top-1 and top-5 of the full-precision, the quantized and the corrected model on labelled images."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cat_plugin.checks import check_finite, check_same_shape
from cat_plugin.correction.hook import uncorrected
from cat_plugin.errors import CATError
from cat_plugin.metrics import ClassChanges, paired_statistics, percent, top_k_correct
from cat_plugin.report.accuracy import AccuracyReport
from cat_plugin.running.collect import progress_bar, to_cpu
from cat_plugin.running.inference import inference
from cat_plugin.running.loaders import ForwardFn, Loader, check_forward, iterate_inputs, run
from cat_plugin.running.models import unwrap
from cat_plugin.running.outputs import Output, check_where, extract
from cat_plugin.running.positions import Drawn, PositionDraw

EVALUATED_POSITIONS = 4096
"""Positions of an image that accuracy is measured on, at most."""
IGNORED = (-100, -1, 255)
"""Labels that mark positions without a class, where outputs have positions and these are no classes."""


def compare_accuracy(
    fp_model: nn.Module,
    quantized_model: nn.Module,
    cat_model: nn.Module,
    loader: Loader,
    *,
    output: Output = None,
    class_axis: int | None = None,
    forward_fn: ForwardFn | None = None,
    batch_size: int = 64,
    progress: bool = False,
    seed: int = 0,
) -> AccuracyReport:
    """Runs the three models over a labelled `loader` and compares them on the same images.

    `quantized_model` may be the model that `cat_model` corrects: its plain output is compared. The
    models are left as they were found. `output` says where their outputs hold the logits, if it is not obvious, see
    `cat_plugin.running.outputs`, and `forward_fn` how a model is called on a batch, see
    `cat_plugin.running.loaders.ForwardFn`: labels are then what a dict has under "labels", or the only part of a tuple,
    but the first, that can be labels. Where outputs have positions, up to `EVALUATED_POSITIONS` of an image are drawn,
    labels are (N, ...) like the outputs without their `class_axis` (see `cat_plugin.running.positions`), and those in
    `IGNORED` do not count. `seed` is that of the draw and of the bootstrap.

    Raises:
        CATError: the loader yields no images, or no class labels, or labels out of range; outputs
            whose logits cannot be told, are not of one shape, or not finite.

    Example:
        >>> import torch
        >>> from cat_plugin import CATWrapper, ClusterAffine, compare_accuracy
        >>> fp_model, quantized_model, images = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3), torch.randn(64, 8)
        >>> cat_model = CATWrapper(quantized_model, ClusterAffine.identity(3))
        >>> found = compare_accuracy(fp_model, quantized_model, cat_model, [(images, fp_model(images).argmax(1))])
        >>> found.fp_top1, found.paired.delta
        (100.0, 0.0)
    """
    models = {"fp_model": fp_model, "quantized_model": quantized_model, "cat_model": cat_model}
    models = {name: unwrap(model, name) for name, model in models.items()}
    check_where(output)
    check_forward(models, forward_fn)
    draw = PositionDraw(class_axis, EVALUATED_POSITIONS, seed)
    top1, top5, seen, owners = [], [], [], []
    classes = images = 0
    with inference(models):
        batches = iterate_inputs(loader, batch_size, whole=forward_fn is not None)
        for batch, labels in progress_bar(batches, loader, batch_size, progress, "CAT: comparing accuracy"):
            outputs, drawn = _outputs(models, partial(run, batch=batch, forward_fn=forward_fn), output, draw)
            classes = outputs["fp_model"].shape[1]
            targets, counted = _targets(drawn.labels(labels), classes, drawn.dense)
            rows = [logits[counted] for logits in outputs.values()]
            top1.append(torch.stack([top_k_correct(logits, targets, 1) for logits in rows]))
            top5.append(torch.stack([top_k_correct(logits, targets, 5) for logits in rows]))
            seen.append(targets)
            if drawn.dense:
                owners.append(images + drawn.images()[counted])
            images += drawn.shape[0]
    correct = torch.cat(top1, dim=1)
    _, quantized, corrected = correct
    return AccuracyReport(
        images,
        min(5, classes),
        *map(percent, correct),
        *map(percent, torch.cat(top5, dim=1)),
        paired_statistics(quantized, corrected, seed, torch.cat(owners) if owners else None),
        correct.shape[1] if owners else None,
        ClassChanges.of(torch.cat(seen), quantized, corrected, classes),
    )


def _outputs(
    models: dict[str, nn.Module], run_model: Callable[[nn.Module], Any], output: Output, draw: PositionDraw
) -> tuple[dict[str, Tensor], Drawn]:
    """Logits (n, C) of every model for one batch, and which of its positions they are of."""
    outputs, shapes, drawn = {}, {}, None
    for name, model in models.items():
        with uncorrected(model) if name == "quantized_model" else nullcontext():
            whole = extract(run_model(model), name, output, lenient=name == "fp_model")
        shapes[name] = whole.shape
        check_same_shape(shapes)
        drawn = draw(whole) if drawn is None else drawn
        outputs[name] = to_cpu(drawn.rows(whole))
    for name, logits in outputs.items():
        check_finite(logits, name)
    return outputs, drawn


def _targets(labels: Tensor | None, classes: int, dense: bool) -> tuple[Tensor, Tensor]:
    """The labels that count, and (n,) bool, which those are."""
    if labels is None:
        raise CATError(
            "accuracy needs class labels, and the loader yields none: expected batches of (input, target) or dicts "
            "with a label key, with one integer class an image, or one a position where outputs have such"
        )
    counted = torch.ones(len(labels), dtype=torch.bool)
    for ignored in IGNORED if dense else ():
        if not 0 <= ignored < classes:
            counted &= labels != ignored
    targets = labels[counted]
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise CATError(
            f"labels run from {int(targets.min())} to {int(targets.max())}, the models have {classes} classes; "
            "expected labels from 0 to classes - 1"
        )
    return targets, counted
