"""Networks that are quantized here, their paired logits, and corrections of them."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from baselines.files import atomic_path
from benchmarks.datasets.dataset import FOLDS_SEED, Dataset
from benchmarks.datasets.images import Images, batches, digests, stacked
from benchmarks.measure.leak_guard import FITTED, LeakGuard, fit_networks_guarded
from benchmarks.measure.paired_logits import PairedLogits, Source
from benchmarks.measure.protocol import Protocol, Setting, quantization_options
from benchmarks.networks.layer_fits import VIEWS, Variation, layer_by_layer, layers_of
from benchmarks.networks.quantized import cache_key, timed_quantized_model
from benchmarks.runs.clock import clock
from benchmarks.runs.files import digest_text
from benchmarks.wording import file_name
from cat_plugin import CATConfig, CATWrapper, ClusterAffine
from cat_plugin.layers.fit import fitting_by
from cat_plugin.running.collect import PairedOutputs, collect_outputs, to_cpu
from cat_plugin.running.inference import inference
from cat_plugin.running.loaders import iterate_inputs, run

logger = logging.getLogger(__name__)

SCORING_BATCH = 256
FEW = 2  # images that show which layers run
LOGITS_FORMAT = "q and f: fresh images, those tuned on, test images"  # changes with what is stored of a network


@dataclass(frozen=True, eq=False, kw_only=True)
class Corrected:
    """What `correction` of the output, with those of layers where there are any, makes of a low-bit network.

    `logits` `(M, C)` are those for the test images, `seconds` what the fit took, running the networks on its images
    included, see `clock`.
    """

    correction: ClusterAffine
    logits: Tensor
    seconds: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Networks:
    """A low-bit network `quantized` and its original, with the images that corrections are fitted on.

    `quantization_seconds` is None where it is unknown. `reused_images` are those for corrections that quantization
    had, too.
    """

    quantized: nn.Module
    fp_model: nn.Module
    dataset: Dataset
    tuned_images: Images
    fit_images: Images
    guard: LeakGuard
    quantization_seconds: float | None
    reused_images: int = 0
    progress: bool = False

    @classmethod
    def made(
        cls,
        setting: Setting,
        protocol: Protocol,
        dataset: Dataset,
        fp_model: nn.Module,
        *,
        cache: Path | None = None,
        cache_device: str = "model",
        progress: bool = False,
    ) -> "Networks":
        """Quantize `fp_model` as `setting` says.

        Raises:
            BenchmarkError: a test image is among those for quantization or for corrections.
        """
        calib, cat = dataset.split(protocol.n_calib, protocol.n_cat, setting.seed)
        guard = LeakGuard(dataset.test_images)
        tuned_on = set(guard.check(calib, "images for quantization"))
        fitted_on = set(guard.check(cat, "images for corrections"))
        device, options = protocol.device, quantization_options(setting, protocol)
        images = stacked(calib).to(device)
        kept = {"cache_device": cache_device, "progress": progress}
        quantized, seconds = timed_quantized_model(fp_model, images, cache, **kept, **options)
        return cls(
            quantized=quantized,
            fp_model=fp_model,
            dataset=dataset,
            tuned_images=images,
            fit_images=cat,
            guard=guard,
            quantization_seconds=seconds,
            reused_images=len(tuned_on & fitted_on) if dataset.cat_images is not None else 0,
            progress=progress,
        )

    @cached_property
    def logits(self) -> PairedLogits:
        """Of both networks for the images of all parts."""
        parts = {
            "tuned": self._tuned_outputs,
            "fit": self._fit_outputs[0],
            "test": self._test_outputs[0],
        }
        logits = {f"{part}_{name}": getattr(found, name) for part, found in parts.items() for name in "qf"}
        return PairedLogits(**logits, labels=self.dataset.test_labels)

    @property
    def collect_seconds(self) -> float:
        """That running both networks on the images for corrections took."""
        return self._fit_outputs[1]

    def correct(self, config: CATConfig) -> Corrected:
        """A correction fitted on the images for that, and the test images' logits with it; the networks stay as they
        were.

        Raises:
            BenchmarkError: a test image is among the images to fit on.
        """
        logits, started = self.logits, self._now()
        if not config.corrects_layers:
            correction = logits.fit(config)
            seconds = self.collect_seconds + self._now() - started
            return Corrected(correction=correction, logits=correction(logits.test_q), seconds=seconds)
        with self._attached(self.fit_images, config, progress=self.progress) as attached:
            seconds = self._now() - started
            return Corrected(correction=attached.correction, logits=self._test_logits(), seconds=seconds)

    def corrected(self, config: CATConfig, rows: slice, variation: Variation) -> Tensor:
        """Logits `(M, C)` of the test images, with layers corrected on `rows` of the images for that; the networks stay
        as they were.

        Raises:
            BenchmarkError: a test image is among these.
        """
        images = self.fit_images[rows]
        if variation.closed_form:
            self.guard.check(images, FITTED)
            with (
                layer_by_layer(self.quantized, self.fp_model, stacked(images).to(self.tuned_images.device)),
                self._attached(images, replace(config, layers="none")),
            ):
                return self._test_logits()
        few = self.tuned_images[:FEW]
        config = replace(config, layers=layers_of(self.quantized, variation.which, few))
        with fitting_by(variation.recipe), self._attached(images, config, augment=VIEWS[variation.views]):
            return self._test_logits()

    @contextmanager
    def _attached(self, images: Images, config: CATConfig, **how: Any) -> Iterator[CATWrapper]:
        """A correction that is fitted on `images` is attached inside the block."""
        attached = fit_networks_guarded(self.quantized, self.fp_model, images, config, self.guard, **how)
        try:
            yield attached
        finally:
            attached.remove()

    def folds(self, n_cat: int) -> list["Fold"]:
        """Of the data set's folds: fitted on `n_cat` of the test images and scored on those of the other half.

        Raises:
            BenchmarkError: a half has fewer images, or an image is in both halves.
        """
        return [Fold.made(self, fit_rows, test_rows, n_cat) for fit_rows, test_rows in self.dataset.folds()]

    @cached_property
    def _tuned_outputs(self) -> PairedOutputs:
        return self._outputs(self.tuned_images, "images for quantization")

    @cached_property
    def _fit_outputs(self) -> tuple[PairedOutputs, float]:
        return self._timed(self.fit_images, "images for corrections")

    @cached_property
    def _test_outputs(self) -> tuple[PairedOutputs, float]:
        return self._timed(self.dataset.test_images, "test images")

    def _timed(self, images: Images, title: str) -> tuple[PairedOutputs, float]:
        started = self._now()
        return self._outputs(images, title), self._now() - started

    def _now(self) -> float:
        return clock(self.tuned_images.device)

    def _outputs(self, images: Images, title: str) -> PairedOutputs:
        loader = batches(images, title if self.progress else None)
        return collect_outputs(self.quantized, self.fp_model, loader, batch_size=SCORING_BATCH)

    def _test_logits(self) -> Tensor:
        """`(M, C)` of the low-bit network as it is now, with what is attached to it."""
        loader = batches(self.dataset.test_images, "corrected test images" if self.progress else None)
        with inference({"quantized_model": self.quantized}):
            found = [to_cpu(run(self.quantized, batch)) for batch, _ in iterate_inputs(loader, SCORING_BATCH)]
        return torch.cat(found)


@dataclass(frozen=True, eq=False, kw_only=True)
class Fold(Networks):
    """The networks of `whole`, corrected on some of its test images, `fit_rows`, and scored on `test_rows`, others.

    Outputs for test images are those of `whole`: the networks run once for all folds.
    """

    whole: Networks
    fit_rows: Tensor
    test_rows: Tensor

    @classmethod
    def made(cls, whole: Networks, fit_rows: Tensor, test_rows: Tensor, n_cat: int) -> "Fold":
        """Fitted on `n_cat` of `fit_rows`, drawn at random.

        Raises:
            BenchmarkError: one of the images is among those to score on.
        """
        drawn = torch.randperm(len(fit_rows), generator=torch.Generator().manual_seed(FOLDS_SEED))[:n_cat]
        data, rows = whole.dataset, fit_rows[drawn]
        tested = replace(data, test_images=data.test_images[test_rows], test_labels=data.test_labels[test_rows])
        guard = LeakGuard(tested.test_images)
        guard.check(data.test_images[rows], "images for corrections")
        shared = {field.name: getattr(whole, field.name) for field in fields(Networks)}
        shared |= {"dataset": tested, "fit_images": data.test_images[rows], "guard": guard}
        return cls(**shared, whole=whole, fit_rows=rows, test_rows=test_rows)

    @property
    def _tuned_outputs(self) -> PairedOutputs:
        return self.whole._tuned_outputs

    @property
    def _fit_outputs(self) -> tuple[PairedOutputs, float]:
        return self._part(self.fit_rows)

    @property
    def _test_outputs(self) -> tuple[PairedOutputs, float]:
        return self._part(self.test_rows)

    def _part(self, rows: Tensor) -> tuple[PairedOutputs, float]:
        outputs, seconds = self.whole._test_outputs
        return PairedOutputs(outputs.q[rows], outputs.f[rows]), seconds * len(rows) / len(outputs.q)


def paired_logits(
    setting: Setting, protocol: Protocol, dataset: Dataset, fp_model: nn.Module, **kept: Any
) -> PairedLogits:
    """The logits of `Networks.made`, which has the same arguments."""
    return Networks.made(setting, protocol, dataset, fp_model, **kept).logits


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
            calib, fresh = dataset.split(protocol.n_calib, protocol.n_cat, setting.seed)
            images = stacked(calib).to(protocol.device)
            key = cache_key(fp_model, images, quantization_options(setting, protocol))
            # The digest of the data knows training images that are files by their names and sizes alone.
            parts = key, data, LOGITS_FORMAT, *digests(fresh)
            path = cache / "logits" / f"{digest_text(*parts)}.safetensors"
            pairs = _stored(path)
            kept = {"cache": cache, "cache_device": cache_device, "progress": progress}
            if pairs is None:
                pairs = paired_logits(setting, protocol, dataset, fp_model, **kept)
                with atomic_path(path) as temporary:
                    save_file(pairs.tensors(), temporary)
            name = f"{dataset.name}-{file_name(model_name)}-{setting.name}"
            networks = partial(Networks.made, setting, protocol, dataset, fp_model, **kept)
            found.append(Source.of(name, pairs, partial(_read, path), networks))
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
