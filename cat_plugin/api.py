"""The main entry point."""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from cat_plugin.config import AUTO, CATConfig
from cat_plugin.correction.hook import refuse_attached
from cat_plugin.correction.module import ClusterAffine
from cat_plugin.errors import CATError
from cat_plugin.evaluation import check_labels, measure_accuracy
from cat_plugin.fitting.fit import Fit
from cat_plugin.fitting.processes import Processes
from cat_plugin.fitting.store import LogitStore
from cat_plugin.kinds import SOFTMAX, VALUE
from cat_plugin.layers.both import fit_both_levels
from cat_plugin.layers.descent import Augment
from cat_plugin.layers.images import KeptImages, flipped
from cat_plugin.report.clusters import profile_clusters
from cat_plugin.report.layers import inspect_models
from cat_plugin.report.report import CATReport
from cat_plugin.report.size import model_bytes
from cat_plugin.report.warnings import find_output_warnings, find_warnings
from cat_plugin.running.collect import PairedOutputs, feed_outputs
from cat_plugin.running.loaders import ForwardFn, Loader, NoImagesError, model_device
from cat_plugin.running.models import unwrap
from cat_plugin.running.outputs import Output
from cat_plugin.wrapper import CATWrapper

logger = logging.getLogger(__name__)


def apply_cat(
    quantized_model: nn.Module,
    fp_model: nn.Module,
    calib_loader: Loader,
    *,
    config: CATConfig | None = None,
    eval_loader: Loader | None = None,
    output: Output = None,
    forward_fn: ForwardFn | None = None,
    augment: str | Augment | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> CATWrapper:
    """Fits corrections of `quantized_model` towards `fp_model` and attaches them (arXiv 2509.26277).

    Of every layer with weights, a scale and an offset per channel, fitted together through the whole model, where
    gradients flow (`cat_plugin.layers.fit`); and of the output, see `cat_plugin.fitting.auto`.
    Runs both models over `calib_loader`, whose labels are ignored. Images that were not used
    to calibrate the quantized model are better, since its error is smaller on those it was tuned on.
    Nothing has to be chosen: maps of several families are weighed on held-out parts of the images, and
    where these show no gain the model is left as it is (the report says so). Where `torch.distributed` is initialised
    (torchrun), every process feeds its own share of the images, labelled ones included; all fit the same correction on
    all of them and report the same accuracy, and where one raises, all do. Inside of `torch.autocast`, models run in
    its precision, and the correction is one of what they give there. Weights, buffers, modes and random states of both
    models stay as they were.

    Args:
        quantized_model: gives logits (N, C), alone or in a tuple, dict or dataclass; it is hooked in place. A wrapper
            that is no module, such as AIMET's `QuantizationSimModel`, is replaced by its `model`.
        fp_model: the full-precision model, which gives logits of the same shape, in the same container or another.
        calib_loader: a DataLoader or list of batches, or one stacked tensor of images.
        config: `CATConfig()` by default.
        eval_loader: labelled images; if given, the report holds top-1 and top-5 of FP, quantized, and corrected. Of a
            tensor, a list or a DataLoader of a dataset with indices, the first batch is looked at before all else.
        output: where the model's output holds the logits, if it is not obvious: a key or field, a position, or two
            functions `(get, set)`, see `cat_plugin.running.outputs`.
        forward_fn: called as `forward_fn(model, batch)` where the models take several inputs or keyword inputs; returns
            what the model returns. `batch` is what the loader yields, with its tensors on the model's device.
        augment: other views of the images that layers are fitted on: `"flip"`, half of them mirrored (along the last
            axis), or a function of a batch of images that gives another one of the same shape. The views have
            full-precision outputs of their own; an image and its views count as one.
        batch_size: into which a loader that is one tensor is cut; by default 64, on a CPU fewer of large images.
        progress: show progress bars.

    Returns:
        The attached wrapper; its `report` says what was fitted and what it gains.

    Raises:
        CATError: `config` is no CATConfig; and see `cat_plugin.running.collect.feed_outputs`, `fit_cluster_affine`
            and `compare_accuracy`. Nothing stays attached.

    Example:
        >>> import copy, torch
        >>> from cat_plugin import apply_cat
        >>> fp_model = torch.nn.Linear(8, 4)
        >>> quantized_model = copy.deepcopy(fp_model)
        >>> quantized_model.weight.data = fp_model.weight.data.round(decimals=1)
        >>> cat_model = apply_cat(quantized_model, fp_model, torch.randn(400, 8))
        >>> cat_model.report.images
        400
        >>> cat_model.remove() is quantized_model
        True
    """
    processes = Processes.all(model_device(quantized_model) if isinstance(quantized_model, nn.Module) else None)
    with ExitStack() as undo:
        with processes.together(), LogitStore() as store:
            config = CATConfig.resolve(config)
            augment = _augment(augment)
            _check_alike(processes, config, eval_loader)
            quantized_model, fp_model = unwrap(quantized_model, "quantized_model"), unwrap(fp_model, "fp_model")
            refuse_attached(quantized_model)
            count, found = inspect_models(quantized_model, fp_model)
            calls = {"forward_fn": forward_fn, "batch_size": batch_size}
            running = {**calls, "progress": progress}
            labelled = {**calls, "output": output, "class_axis": config.class_axis, "processes": processes}
            if eval_loader is not None:
                check_labels(fp_model, eval_loader, **labelled)
            kept = KeptImages() if config.corrects_layers else None
            start = time.perf_counter()
            reused = _collect(store, kept, processes, quantized_model, fp_model, calib_loader, config, output, running)
            collected = time.perf_counter()
            store.match(processes)
            how = {"output": output, "forward_fn": forward_fn, "augment": augment, "progress": progress}
            fit, layers, fitted_on = fit_both_levels(quantized_model, fp_model, kept, store, config, processes, **how)
            fitted = time.perf_counter()
            corrections = {} if layers is None else layers.corrections
            cat_model = CATWrapper(quantized_model, fit.correction, None, config, output=output, layers=corrections)
            undo.callback(cat_model.remove)
            accuracy = None
            if eval_loader is not None:
                accuracy = measure_accuracy(
                    fp_model, quantized_model, cat_model, eval_loader, **labelled, progress=progress
                )
            # Where nothing changes there is nothing to show.
            profiled = fit.out is not None and (fit.evidence is None or fit.evidence.accepted)
            evidence = None if layers is None else layers.evidence
            cat_model.report = CATReport(
                images=fit.images,
                positions=fit.positions,
                num_clusters=fit.correction.num_clusters,
                cluster_sizes=_cluster_sizes(fitted_on, fit.correction, processes),
                held_out=fit.scores,
                layers=evidence,
                evidence=fit.evidence,
                warnings=(*found, *_output_warnings(fit, config, _reused_share(reused, store.num_images, processes))),
                quantized_layers=count,
                added_parameters=_total(cat_model, "num_parameters"),
                added_bytes=_total(cat_model, "num_bytes"),
                model_bytes=model_bytes(quantized_model),
                collect_seconds=collected - start,
                fit_seconds=fitted - collected,
                accuracy=accuracy,
                clusters=profile_clusters(fit.correction, fit.q, fit.f, fit.out, config.kind) if profiled else (),
            )
        undo.pop_all()
    logger.info("%s", cat_model.report)
    for warning in cat_model.report.warnings:
        logger.warning("%s", warning)
    return cat_model


def _augment(augment: str | Augment | None) -> Augment | None:
    if augment is None or callable(augment):
        return augment
    if augment == "flip":
        return flipped
    raise CATError(f'augment={augment!r} should be "flip", or a function of a batch of images')


def _total(cat_model: CATWrapper, what: str) -> int:
    return sum(getattr(part, what) for part in (cat_model.correction, *cat_model.layers.values()))


def _check_alike(processes: Processes, config: CATConfig, eval_loader: Loader | None) -> None:
    """Raises a `CATError` where labelled images are of no use, or processes were asked for different things."""
    if eval_loader is not None and config.kind is not SOFTMAX:
        raise CATError(
            f"eval_loader= with output_kind={config.output_kind!r}: accuracy is measured on one class an image; leave "
            "it out and evaluate as you do without CAT"
        )
    asked = processes.gather((config, eval_loader is not None))
    if len(set(asked)) > 1:
        given = (f"{config}, eval_loader {'given' * has or 'left out'}" for config, has in asked)
        raise CATError(
            f"the processes were asked for different things: {'; '.join(given)}; give all of them the same (an empty "
            "eval_loader where one has no labelled images)"
        )


def _collect(
    store: LogitStore,
    kept: KeptImages | None,
    processes: Processes,
    quantized_model: nn.Module,
    fp_model: nn.Module,
    loader: Loader,
    config: CATConfig,
    output: Output,
    running: Mapping[str, Any],
) -> list[float]:
    """Fills `store` and `kept`; returns for every batch how many images the quantized model was calibrated on."""
    reused: list[float] = []

    def consume(batch: PairedOutputs) -> None:
        store.append(batch.q, batch.f, batch.images, batch.keys)
        if kept is not None:
            kept.append(batch.inputs)
        if batch.calibrated is not None:
            reused.append(batch.calibrated.double().sum().item())

    drawing = {"class_axis": config.class_axis, "positions": config.positions, "seed": config.seed}
    drawing["binary"] = config.kind is not VALUE
    try:
        feed_outputs(quantized_model, fp_model, loader, consume, output=output, **drawing, **running)
    except NoImagesError:
        if not processes.several:  # others may have images
            raise
    return reused


def _cluster_sizes(store: LogitStore, correction: ClusterAffine, processes: Processes) -> tuple[int, ...]:
    """How many rows of all processes are in each cluster."""
    device, sizes = correction.scale.device, torch.zeros(correction.num_clusters, dtype=torch.int64, device="cpu")
    for q, _ in store.chunks():
        ids = correction.assign(q.to(device, store.dtype)).cpu()
        sizes += torch.bincount(ids, minlength=correction.num_clusters)
    return tuple(processes.sum(sizes).tolist())


def _reused_share(reused: list[float], images: int, processes: Processes) -> float | None:
    """Share of the images of all processes that the quantized model was calibrated on; None if it does not tell."""
    counts = [sum(reused), float(bool(reused)), float(images)]
    known, told, total = processes.sum(torch.tensor(counts, dtype=torch.float64, device="cpu")).tolist()
    return known / total if told else None


def _output_warnings(fit: Fit, config: CATConfig, reused: float | None) -> list[str]:
    """What makes the fit doubtful."""
    said = None if config.output_kind == AUTO else config.kind
    about_images = find_warnings(fit.f, fit.images, fit.repeated, reused, config.kind)
    return find_output_warnings(fit.q, fit.f, said) + about_images
