"""Top-1 and top-5 of the full-precision, the quantized and the corrected model on labelled images."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from cat_plugin.correction.hook import uncorrected
from cat_plugin.errors import CATError
from cat_plugin.fitting.processes import ALONE, Processes
from cat_plugin.fitting.store import groups_of_alike
from cat_plugin.metrics import ClassChanges, paired_statistics, percent, top_k_correct
from cat_plugin.report.accuracy import AccuracyReport
from cat_plugin.running.checks import check_finite, check_same_shape
from cat_plugin.running.collect import progress_bar, to_cpu
from cat_plugin.running.digests import output_keys
from cat_plugin.running.inference import inference
from cat_plugin.running.loaders import (
    ForwardFn,
    Loader,
    NoImagesError,
    batch_size_for,
    check_forward,
    iterate_inputs,
    run,
)
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
    batch_size: int | None = None,
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
    how = {"output": output, "class_axis": class_axis, "forward_fn": forward_fn, "batch_size": batch_size}
    return measure_accuracy(fp_model, quantized_model, cat_model, loader, progress=progress, seed=seed, **how)


def measure_accuracy(
    fp_model: nn.Module,
    quantized_model: nn.Module,
    cat_model: nn.Module,
    loader: Loader,
    *,
    output: Output = None,
    class_axis: int | None = None,
    forward_fn: ForwardFn | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    seed: int = 0,
    processes: Processes = ALONE,
) -> AccuracyReport:
    """As `compare_accuracy`, over the images of all `processes`, each of which calls this with its own share.

    An image that several processes have, as a `DistributedSampler` pads them, counts once.

    Raises:
        CATError: as `compare_accuracy`; no process has images.
    """
    models = {"fp_model": fp_model, "quantized_model": quantized_model, "cat_model": cat_model}
    models = {name: unwrap(model, name) for name, model in models.items()}
    check_where(output)
    check_forward(models, forward_fn)
    draw = PositionDraw(class_axis, EVALUATED_POSITIONS, seed, binary=True)
    seen: list[_Seen] = []
    batch_size = batch_size_for(loader, models["quantized_model"], batch_size)
    with inference(models):
        batches = iterate_inputs(loader, batch_size, whole=forward_fn is not None)
        try:
            for batch, labels in progress_bar(batches, loader, batch_size, progress, "CAT: comparing accuracy"):
                found = _outputs(models, partial(run, batch=batch, forward_fn=forward_fn), output, draw)
                seen.append(_Seen.of(*found, labels))
        except NoImagesError:
            if not processes.several:
                raise
    together = _Seen.gathered(seen, processes)
    (_, quantized, corrected), classes = together.correct, together.classes
    return AccuracyReport(
        together.images,
        min(5, classes),
        *map(percent, together.correct),
        *map(percent, together.among_top5),
        paired_statistics(quantized, corrected, seed, together.owners if together.dense else None),
        together.correct.shape[1] if together.dense else None,
        ClassChanges.of(together.targets, quantized, corrected, classes),
    )


def check_labels(
    fp_model: nn.Module,
    loader: Loader,
    *,
    output: Output = None,
    class_axis: int | None = None,
    forward_fn: ForwardFn | None = None,
    batch_size: int | None = None,
    processes: Processes = ALONE,
) -> None:
    """Raises what `measure_accuracy` will of the labels in the first batch, ahead of work that takes long.

    Only where a batch may be read twice: of a tensor, a list, or a `DataLoader` of a dataset that has indices.
    """
    indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if not (indexed or isinstance(loader, Tensor | list)):
        return
    with inference({"fp_model": fp_model}):
        size = batch_size_for(loader, fp_model, batch_size)
        try:
            batch, labels = next(iter(iterate_inputs(loader, size, whole=forward_fn is not None)))
        except NoImagesError:
            if not processes.several:
                raise
            return
        logits = extract(run(fp_model, batch, forward_fn), "fp_model", output, lenient=True)
        drawn = PositionDraw(class_axis, EVALUATED_POSITIONS, 0, binary=True)(logits)
        _targets(drawn.labels(labels), drawn.rows(logits).shape[1], drawn.dense)


@dataclasses.dataclass(frozen=True, eq=False)
class _Seen:
    """What counts of labelled images.

    targets: (n,) labels of the rows that have one, and owners: (n,) the image of each, from 0. correct, among_top5: (3,
    n) bool for FP, quantized and corrected. keys: (images, 2) float64, which tell images apart.
    """

    targets: Tensor
    owners: Tensor
    correct: Tensor
    among_top5: Tensor
    keys: Tensor
    classes: int
    dense: bool

    @property
    def images(self) -> int:
        return len(self.keys)

    @classmethod
    def of(cls, outputs: dict[str, Tensor], drawn: Drawn, keys: Tensor, labels: Tensor | None) -> "_Seen":
        """Of one batch, whose logits (n, C) are `outputs` of the three models."""
        classes = outputs["fp_model"].shape[1]
        targets, counted = _targets(drawn.labels(labels), classes, drawn.dense)
        rows = [logits[counted] for logits in outputs.values()]
        owners = drawn.images()
        owners = (torch.arange(len(counted), device=counted.device) if owners is None else owners)[counted]
        top1, top5 = (torch.stack([top_k_correct(logits, targets, k) for logits in rows]) for k in (1, 5))
        return cls(targets, owners, top1, top5, keys, classes, drawn.dense)

    @classmethod
    def gathered(cls, parts: list["_Seen"], processes: Processes) -> "_Seen":
        """All batches of all processes, without images that a process of lower rank has, too."""
        starts = np.cumsum([0, *(part.images for part in parts)]).tolist()
        kinds = {kind for found in processes.gather([(part.classes, part.dense) for part in parts]) for kind in found}
        if not kinds:
            raise NoImagesError
        if len(kinds) > 1:
            raise CATError(f"labelled images have outputs of several kinds, {sorted(kinds)} (classes, positions)")
        ((classes, dense),) = kinds
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        targets = torch.cat([none, *(part.targets for part in parts)])
        owners = torch.cat([none, *(part.owners + start for part, start in zip(parts, starts, strict=False))])
        hits = torch.cat([none.bool().reshape(0, 6), *(torch.cat([p.correct, p.among_top5]).T for p in parts)])
        keys = torch.cat([torch.empty(0, 2, dtype=torch.float64, device="cpu"), *(part.keys for part in parts)])
        owners = owners + processes.before(len(keys))
        ranks = processes.gather_rows(torch.full((len(keys),), processes.rank, device="cpu"))
        targets, owners, hits, keys = map(processes.gather_rows, (targets, owners, hits, keys))
        kept = ~_had_by_others(keys, ranks)
        counted = kept[owners]
        owners, hits = (kept.cumsum(0) - 1)[owners[counted]], hits[counted].T
        return cls(targets[counted], owners, hits[:3], hits[3:], keys[kept], classes, dense)


def _had_by_others(keys: Tensor, ranks: Tensor) -> Tensor:
    """(images,) bool: whether a process of lower rank has an image with the same `keys` (images, 2), too."""
    if len(ranks.unique()) < 2:
        return torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
    groups = groups_of_alike(keys)
    lowest = torch.full((len(keys),), int(ranks.max()), device=keys.device).scatter_reduce(0, groups, ranks, "amin")
    return ranks > lowest[groups]


def _outputs(
    models: dict[str, nn.Module], run_model: Callable[[nn.Module], Any], output: Output, draw: PositionDraw
) -> tuple[dict[str, Tensor], Drawn, Tensor]:
    """Logits (n, C) of every model for one batch, which of its positions they are of, and keys of its images."""
    outputs, shapes, means, drawn = {}, {}, [], None
    for name, model in models.items():
        with uncorrected(model) if name == "quantized_model" else nullcontext():
            whole = extract(run_model(model), name, output, lenient=name == "fp_model")
        shapes[name] = whole.shape
        check_same_shape(shapes)
        drawn = draw(whole) if drawn is None else drawn
        outputs[name] = to_cpu(drawn.rows(whole))
        means.append(drawn.means(whole))
    for name, logits in outputs.items():
        check_finite(logits, name)
    return outputs, drawn, output_keys(means[1], means[0])


def _targets(labels: Tensor | None, classes: int, dense: bool) -> tuple[Tensor, Tensor]:
    """The labels that count, and (n,) bool, which those are."""
    if labels is None:
        raise CATError(
            "accuracy needs class labels, and the loader yields none: expected batches of (input, target) or dicts "
            "with a label key, with one integer class an image, or one a position where outputs have such; take "
            "labels.long() of floats, labels.argmax(1) of one-hot rows"
        )
    counted = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
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
