"""Corrections of all layers, fitted together and judged on images that they were not fitted on.

The images are cut into folds. Each has its outputs from corrections that were fitted on the others, so that how
far to go, whether it is worth it, and the correction of the output that comes after are found on outputs that the
layers were not fitted to. What is attached is the mean of all fits: since rounding makes the way rough, each ends
somewhere around its best, and their mean nearer to it.
"""

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from tqdm import tqdm

from cat_plugin.config import CATConfig
from cat_plugin.correction.channel_affine import ChannelAffine
from cat_plugin.fitting.processes import Processes
from cat_plugin.fitting.store import LogitStore, different_images, groups_of_alike
from cat_plugin.kinds import VALUE, OutputKind
from cat_plugin.layers.descent import FIRST_SCALE, NEAREST, RATES, Augment, Descent, Divergence, Schedule
from cat_plugin.layers.evidence import LayerChange, LayersEvidence
from cat_plugin.layers.gradients import fitting_through
from cat_plugin.layers.images import KeptImages, Part
from cat_plugin.layers.network import BATCH, CorrectedNetwork
from cat_plugin.layers.place import Place, candidates, check_named, measuring, places, spread_of, sums_of
from cat_plugin.running.inference import inference, seed_devices
from cat_plugin.running.loaders import ForwardFn, run
from cat_plugin.running.outputs import Output, extract

logger = logging.getLogger(__name__)

MIN_IMAGES = 64
"""Under which `"auto"` does not try."""
STEPS = {"near": 100, "midway": 100, "far": 150}
"""Of a fit on 683 images, two thirds of 1,024, at each of `RATES`; as the square root of their number, so that of more
images each is seen less often."""
SHORT_WAY = 0.7
"""Of the mean root divergence of the model as it is: the nearest rate is tried where at least so much is left."""
FOLDS = 3
SHARES = (1.0, 0.5)
"""Of the way from the identity to the fitted corrections."""
WATCHED = 32
"""Held-out images whose divergence is followed from epoch to epoch."""
PROBED = 8
"""Images that a gradient is tried on."""
PROBED_SCALES = 1.0, FIRST_SCALE
"""Of the gradient: half precision has no numbers for small ones, so layers that none reaches are tried again."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What `python -m benchmarks ablate` changes of the fit. No option of `apply_cat`: its tables give no reason.

    rates: those of `RATES` to choose from, from near to far; steps: a factor of `STEPS`; scales, offsets: whether they
    are fitted.
    """

    rates: tuple[str, ...] = tuple(RATES)
    steps: float = 1.0
    scales: bool = True
    offsets: bool = True


_RECIPE: ContextVar[Recipe | None] = ContextVar("recipe of the fit", default=None)


@contextmanager
def fitting_by(recipe: Recipe) -> Iterator[None]:
    """Layers are fitted by `recipe` inside the block."""
    token = _RECIPE.set(recipe)
    try:
        yield
    finally:
        _RECIPE.reset(token)


@dataclasses.dataclass(frozen=True, eq=False)
class LayersFit:
    """Corrections by the names of layers, what is known of them, and (n, C) outputs of the kept images of this process
    with corrections that were fitted without them; None where there are none."""

    corrections: Mapping[str, ChannelAffine]
    evidence: LayersEvidence
    held_out: Tensor | None = None


def left_alone(reason: str, **known: Any) -> LayersFit:
    """No corrections, and why."""
    return LayersFit({}, LayersEvidence(False, reason, **known))


def schedule_for(images: int, rate: str, factor: float = 1.0) -> Schedule:
    """Of a fit on so many images at one of `RATES`, with `factor` times as many steps as usual."""
    steps = max(round(images / BATCH), 1)
    total = factor * STEPS[rate] * math.sqrt(images / 683)
    return Schedule(max(round(total / steps), 1), steps)


def fit_layers(
    quantized_model: nn.Module,
    fp_model: nn.Module,
    kept: KeptImages,
    store: LogitStore,
    config: CATConfig,
    processes: Processes,
    *,
    output: Output = None,
    forward_fn: ForwardFn | None = None,
    augment: Augment | None = None,
    progress: bool = False,
) -> LayersFit:
    """Fits a scale and an offset for every channel of the layers that `config.layers` says, through the whole model.

    Both models are left as they were found, also when something raises, `KeyboardInterrupt` included. Whether the
    result is worth having is left to the caller: `evidence.accepted` says only that there is one.

    Args:
        kept: the images of this process; store: outputs of both models for them.
        augment: gives other views of the images, each with full-precision outputs of its own.

    Raises:
        CATError: a layer that was named cannot be corrected.
    """
    started = time.perf_counter()
    layers = candidates(quantized_model, config.layers if isinstance(config.layers, tuple) else "all")
    if not layers:
        return left_alone("no layer with weights that takes a hook is in the model")
    with ExitStack() as stack:
        stack.enter_context(inference({"quantized_model": quantized_model, "fp_model": fp_model}))
        stack.enter_context(torch.inference_mode(False))
        seed_devices((quantized_model, fp_model), config.seed)  # of what `augment` draws
        return _Fit(quantized_model, fp_model, kept, store, config, processes, output, forward_fn, augment).made(
            layers, started, progress
        )


class _Trial(NamedTuple):
    """A fit at `rate`: its vector, the divergence of some held-out images before it and after each epoch, and (n, C)
    outputs of all held-out images of this process."""

    rate: str
    vector: Tensor
    curve: Sequence[float]
    outputs: Tensor


class _Fit:
    """The arguments of `fit_layers`, and its steps."""

    def __init__(
        self,
        model: nn.Module,
        fp_model: nn.Module,
        kept: KeptImages,
        store: LogitStore,
        config: CATConfig,
        processes: Processes,
        output: Output,
        forward_fn: ForwardFn | None,
        augment: Augment | None,
    ) -> None:
        self.model, self.fp_model, self.kept, self.processes = model, fp_model, kept, processes
        self.config, self.augment = config, augment
        self.reading = {"output": output, "forward_fn": forward_fn}
        everything = torch.arange(len(kept), device="cpu")
        self.rows_of = store.rows_of
        self.q, self.f = (part.float() for part in store.take(store.rows_of(everything)[0]))
        self.folds, self.fold_of, self.distinct = _folds(kept, store, config.seed, processes)
        self.divergence = _divergence(config.kind, self.f, processes)

    def made(self, layers: dict[str, nn.Module], started: float, progress: bool) -> LayersFit:
        placed, failure = self._places(layers)
        if failure:
            return left_alone(f"the quantized model does not take its images in other batches ({failure})")
        if not placed:
            return left_alone("no layer gives a floating-point tensor with channels")
        network, unreached, failure = self._reached(layers, placed)
        if network is None:
            return left_alone(failure, unreached=unreached)
        images = int(self.processes.sum(torch.tensor(float(self.distinct.sum()), device="cpu")).item())
        if self.folds < 2:
            return left_alone("all images come in one batch that only forward_fn takes apart; give smaller batches")
        recipe, fitted_on = _RECIPE.get() or Recipe(), images * (FOLDS - 1) // FOLDS
        schedules = {rate: schedule_for(fitted_on, rate, recipe.steps) for rate in recipe.rates}
        known = {"images": images, "unreached": unreached}
        totals = [each.total for each in schedules.values()]
        most = sum(totals) + (self.folds - 1) * max(totals)
        self._log_costs(network, placed, most)
        held_out = {share: torch.empty_like(self.q) for share in SHARES}
        bar = tqdm(total=most, desc="CAT: fitting layers", disable=not progress)
        with bar, fitting_through(self.model), network.attached():
            descent = Descent(
                network,
                self.kept,
                self._targets,
                self.divergence,
                self.processes,
                self.augment,
                fitted=network.chosen(recipe.scales, recipe.offsets),
            )
            rate, trials = None, []
            for fold in range(self.folds):
                chosen, outside = _indices((self.fold_of != fold) & self.distinct), _indices(self.fold_of == fold)
                fitted = partial(self._fitted, network, descent, schedules, fold, chosen, outside, bar)
                trial = fitted(rate) if rate else self._nearest(fitted, recipe.rates, outside)
                if trial is None:
                    return left_alone("nothing to gain: no rate of the fit brings held-out images nearer", **known)
                if rate is None:
                    rate = trial.rate
                    bar.total = bar.n + (self.folds - 1) * schedules[rate].total
                trials.append(trial)
                rows = self.rows_of(outside)[0]
                for share, outputs in held_out.items():
                    whole = share == 1
                    outputs[rows] = trial.outputs if whole else self._outputs(network, share * trial.vector, outside)
            images_once = _indices(self.distinct)
            rows = self.rows_of(images_once)[0]
            share = min(SHARES, key=lambda share: self._root(held_out[share][rows], images_once))
        vector = torch.stack([trial.vector for trial in trials]).mean(dim=0)
        corrections = network.corrections(share * vector)
        changes = _changes(corrections, network.places)
        evidence = LayersEvidence(
            True,
            "",
            layers=changes,
            **known,
            rate=rate,
            share=share,
            epochs=schedules[rate].epochs,
            steps=schedules[rate].steps,
            curve=tuple(sum(values) / len(trials) for values in zip(*(trial.curve for trial in trials), strict=True)),
            operations=sum(place.numbers for place in network.places),
            seconds=time.perf_counter() - started,
        )
        return LayersFit(corrections, evidence, held_out[share])

    def _nearest(self, fitted: Callable[[str], _Trial], rates: Sequence[str], outside: Tensor) -> _Trial | None:
        """The fit whose rate brings the images `outside` nearest, tried from far to near for as long as it brings them
        nearer; None where they are nearest as they are."""
        plain, best, least = self._root(self.q[self.rows_of(outside)[0]], outside), None, math.inf
        for rate in reversed(rates):
            if best is not None and rate == NEAREST and least < SHORT_WAY * plain:
                break
            trial = fitted(rate)
            root = self._root(trial.outputs, outside)
            if best is not None and not root < least:
                break
            best, least = trial, root
        return best if least < plain else None

    def _fitted(
        self,
        network: CorrectedNetwork,
        descent: Descent,
        schedules: Mapping[str, Schedule],
        number: int,
        chosen: Tensor,
        outside: Tensor,
        bar: tqdm,
        rate: str,
    ) -> _Trial:
        """A fit on the images `chosen`, judged on those `outside`."""
        watched = outside[self.distinct[outside]][:WATCHED]
        curve = [self._divergences(self.q[self.rows_of(watched)[0]], watched).mean().item()]

        def watch(vector: Tensor) -> None:
            curve.append(self._divergences(self._outputs(network, vector, watched), watched).mean().item())
            bar.set_postfix_str(f"held-out divergence {curve[0]:.4f} -> {curve[-1]:.4f}")

        vector = descent.fit(chosen, schedules[rate], rate, self.config.seed + number, watch, bar.update)
        return _Trial(rate, vector, curve, self._outputs(network, vector, outside))

    def _places(self, layers: dict[str, nn.Module]) -> tuple[list[Place], str]:
        """Those of the layers that run, and why the model fails on other batches than it was given, if it does."""
        failure = ""
        with torch.no_grad(), measuring(layers) as measures:
            first = _indices(self.distinct)[:BATCH]
            try:
                for part in self.kept.parts(first, size=BATCH):
                    run(self.model, part.batch, self.reading["forward_fn"])
            except Exception as error:  # exported programs may know one size of batches only
                failure = _first_line(error)
                logger.debug("the quantized model fails on other batches", exc_info=True)
        failure = next(filter(None, self.processes.gather(failure)), "")
        if failure:
            return [], failure
        found = places(measures, self.processes)
        check_named(self.config.layers, found)
        return found, ""

    def _reached(
        self, layers: dict[str, nn.Module], placed: list[Place]
    ) -> tuple[CorrectedNetwork | None, tuple[str, ...], str]:
        """The network with the layers that a gradient reaches, the names of the others, and why there is none."""
        network = CorrectedNetwork(self.model, layers, placed, **self.reading)
        failure, found = "", [False] * len(placed)
        with fitting_through(self.model), network.attached():
            try:
                for part, scale in itertools.product(self._probed(), PROBED_SCALES):
                    if not all(found):
                        here = network.reached(self._gradient_at_identity(network, part, scale))
                        found = [a or b for a, b in zip(found, here, strict=True)]
            except Exception as error:  # kernels without gradients raise anything
                failure = f" ({_first_line(error)})"
                logger.debug("no gradients through the quantized model", exc_info=True)
        everywhere = self.processes.sum(torch.tensor(found, dtype=torch.float64, device="cpu")) > 0
        unreached = tuple(place.name for place, yes in zip(placed, everywhere, strict=True) if not yes)
        kept = [place for place, yes in zip(placed, everywhere, strict=True) if yes]
        if not kept:
            reason = f"no gradient reaches a layer of the quantized model{failure}; its output alone is corrected"
            return None, unreached, reason
        if unreached:
            logger.warning(
                "%d layers that no gradient reaches are left alone: %s", len(unreached), ", ".join(unreached)
            )
        network = CorrectedNetwork(self.model, layers, kept, **self.reading)
        part = next(self._probed(), None)
        if part is not None and part.inside is None:
            with fitting_through(self.model), network.attached():
                network.arrange(lambda: self._gradient_at_identity(network, part))
        return network, unreached, ""

    def _probed(self) -> Iterator[Part]:
        """A few images that the model is tried on, all of this process if there are no more."""
        return self.kept.parts(_indices(self.distinct)[:PROBED], size=PROBED)

    def _gradient_at_identity(self, network: CorrectedNetwork, part: Part, scale: float = 1.0) -> Tensor | None:
        """That of the summed divergence times `scale`, where nothing is corrected; None if the outputs do not depend on
        layers."""
        vector = torch.zeros(network.size, device=network.device, requires_grad=True)
        rows = network.rows(part, vector)
        loss = scale * self.divergence(self._targets(part).to(rows.device), rows.float()).sum()
        return torch.autograd.grad(loss, vector, allow_unused=True)[0]

    def _targets(self, part: Part) -> Tensor:
        """(n, C) full-precision outputs: those that are known, or of other views of the images."""
        if self.augment is None:
            return self.f[self.rows_of(part.images)[0]]
        with torch.no_grad():
            returned = run(self.fp_model, part.batch, self.reading["forward_fn"])
            return part.rows(extract(returned, "fp_model", self.reading["output"], lenient=True)).float()

    def _outputs(self, network: CorrectedNetwork, vector: Tensor, images: Tensor) -> Tensor:
        """(n, C) float32 outputs of the given images, in their order, which is ascending, on the CPU."""
        with torch.no_grad():
            parts = self.kept.parts(images, size=network.at_once)
            rows = [network.rows(part, vector).to("cpu", torch.float32) for part in parts]
        return torch.cat(rows) if rows else self.q[:0]

    def _divergences(self, outputs: Tensor, images: Tensor) -> Tensor:
        """(n,) float64 mean divergence of each of the given images of all processes, where `outputs` are theirs."""
        rows, owners = self.rows_of(images)
        divergence = self.divergence(self.f[rows], outputs).double()
        sums = torch.zeros(len(images), dtype=torch.float64, device="cpu").index_add_(0, owners, divergence)
        return self.processes.gather_rows(sums / torch.bincount(owners, minlength=len(images)))

    def _root(self, outputs: Tensor, images: Tensor) -> float:
        """The mean root of the divergence of the given images, alike in all processes: of the divergence
        itself a few images hold so much that chance would choose. Infinite where outputs are not finite."""
        root = self._divergences(outputs, images).clamp(min=0).sqrt().mean().item()
        return self.processes.agree(root if math.isfinite(root) else math.inf)

    def _log_costs(self, network: CorrectedNetwork, placed: Sequence[Place], steps: int) -> None:
        """Says what the fit will take."""
        part = next(self._probed(), None)
        if part is None:
            return
        with fitting_through(self.model), network.attached():
            started = time.perf_counter()
            self._gradient_at_identity(network, part)
            seconds = (time.perf_counter() - started) * steps * BATCH / max(len(part.images), 1)
        memory = 4 * network.at_once * 4 * sum(place.numbers for place in placed) / 2**20
        logger.info(
            "%d layers, %d steps of %d images: about %.0f s and %.0f MiB", len(placed), steps, BATCH, seconds, memory
        )


def _folds(kept: KeptImages, store: LogitStore, seed: int, processes: Processes) -> tuple[int, Tensor, Tensor]:
    """How many folds there are, (images,) int64 fold of every kept image, and (images,) bool, one of those alike.

    Images that are alike, or have to be run together, are in one fold.
    """
    count, groups = len(kept), kept.groups()
    before, alone = processes.before(count), all(processes.gather(len(groups.unique()) == count))
    keys = processes.gather_rows(store.keys()[:count])
    alike = groups_of_alike(keys)
    distinct = torch.ones(len(keys), dtype=torch.bool, device="cpu")
    if alone:
        different = different_images(keys)
        distinct = torch.zeros_like(distinct).index_fill_(0, different, True)
        together, total = alike, len(different)
    else:  # groups that have an image in common are one
        own = processes.gather_rows(groups + processes.before(int(groups.max()) + 1 if count else 0))
        size = int(own.max()) + 1
        edges = coo_matrix((np.ones(len(own)), (own.numpy(), size + alike.numpy())), shape=(2 * size + len(own),) * 2)
        label = torch.from_numpy(connected_components(edges, directed=False)[1]).long()[own]
        together = label.unique(return_inverse=True)[1]
        total = int(together.max()) + 1
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed), device="cpu")
    folds, mine = min(FOLDS, total), slice(before, before + count)
    return folds, (order % folds)[together][mine], distinct[mine]


def _divergence(kind: OutputKind, f: Tensor, processes: Processes) -> Divergence:
    """That of the kind; of values in units of their variance."""
    if kind is not VALUE:
        return kind.divergence
    spread = spread_of(processes.sum(sums_of(f))).clamp(min=1e-6).float()
    return lambda f, outputs: kind.divergence(f / spread.to(f.device), outputs / spread.to(outputs.device))


def _changes(corrections: Mapping[str, ChannelAffine], places: Sequence[Place]) -> tuple[LayerChange, ...]:
    made = []
    for place in places:
        correction = corrections[place.name]
        scale = (correction.scale - 1).abs().mean().item()
        shift = (correction.shift.cpu() / place.spread).abs().mean().item()
        made.append(LayerChange(place.name, place.channels, scale, shift))
    return tuple(made)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _indices(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)
