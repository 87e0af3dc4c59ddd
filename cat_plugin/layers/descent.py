"""Fitting the corrections of all layers together: Adam on the divergence of the outputs from those of FP."""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cat_plugin.correction.module import compute_dtype
from cat_plugin.fitting.processes import Processes
from cat_plugin.layers.images import KeptImages, Part
from cat_plugin.layers.network import CorrectedNetwork
from cat_plugin.layers.recording import Recorded

logger = logging.getLogger(__name__)

RATES = {"near": 0.044, "midway": 0.14, "far": 0.44}
"""Of Adam at the start, in scales and in offsets as shares of their channel's spread, over the number of layers, since
what all of them change adds up. Reconstructed networks are near their best, rounded ones far."""
NEAREST = next(iter(RATES))
FEWEST_LAYERS = 20
"""With fewer layers the rate is as with so many."""
PULL = 1e-5
"""Towards the identity: weight of the summed squares of all deviations in the loss."""
FIRST_SCALE = 2.0**10
"""Of gradients, so that half precision has numbers for small ones, wherever the model computes in it."""
SMALLEST_MICRO_BATCH = 1
MANY = 10
"""One step in so many that is left out is worth a warning."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long to fit: `epochs` passes over the images, each in random order, in `steps` steps."""

    epochs: int
    steps: int

    @property
    def total(self) -> int:
        return self.epochs * self.steps


Divergence = Callable[[Tensor, Tensor], Tensor]
"""(n,) divergences of outputs (n, C) from those of full precision (n, C)."""
Augment = Callable[[Tensor], Tensor]
"""Another view of a batch of images, of the same shape."""
Targets = Callable[[Part], Tensor]
"""(n, C) full-precision outputs of the images of a part that count."""


class Descent:
    """Adam on the vector of a `CorrectedNetwork`.

    Args:
        targets: full-precision outputs of the kept images, and of views of them, where there is `augment`.
        processes: each has images of its own; the gradient is that of the mean over all.
        micro_batch: most images at a time, those of a step in turn; by default as many as are fast.
        fitted: 0 where the vector stays as it is, else 1; all is fitted by default.
    """

    def __init__(
        self,
        network: CorrectedNetwork,
        kept: KeptImages,
        targets: Targets,
        divergence: Divergence,
        processes: Processes,
        augment: Augment | None = None,
        micro_batch: int | None = None,
        fitted: Tensor | float = 1.0,
    ) -> None:
        self._network, self._kept, self._targets, self._divergence = network, kept, targets, divergence
        self._processes, self._augment = processes, augment
        self.micro_batch = micro_batch or network.at_once
        self._fitted = fitted
        # In place of `GradScaler`, which not all devices have; a power of two changes no figure in float32.
        self._scale = torch.empty((), dtype=torch.float32, device=network.device)
        self._recorded = Recorded(self._gradient_of, network.device)

    def fit(
        self,
        images: Tensor,
        schedule: Schedule,
        rate: str,
        seed: int,
        after_epoch: Callable[[Tensor], None] | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """The vector that is best for the given images (n,) int64 of this process, after `schedule`, with one of
        `RATES` that falls to 0 by a cosine. Steps whose gradient is not finite are left out.
        """
        self._scale.fill_(FIRST_SCALE)  # of a fit before it may be nothing that is left
        vector = torch.zeros(self._network.size, device=self._network.device, requires_grad=True)
        first = RATES[rate] / max(len(self._network.places), FEWEST_LAYERS)
        adam = torch.optim.Adam([vector], lr=first)
        generator = torch.Generator().manual_seed(seed)
        step = left_out = 0
        for _ in range(schedule.epochs):
            for part in self._kept.parts(images, schedule.steps, generator):
                adam.param_groups[0]["lr"] = first * (1 + math.cos(math.pi * step / schedule.total)) / 2
                gradient = self._gradient(vector, part)
                if gradient.isfinite().all():
                    vector.grad = gradient
                    adam.step()
                else:
                    left_out += 1
                    self._scale.mul_(0.5)
                step += 1
                if after_step is not None:
                    after_step()
            if after_epoch is not None:
                after_epoch(vector.detach())
        if left_out:  # a few are how a scale for half precision is found
            level = logging.WARNING if MANY * left_out > step else logging.INFO
            logger.log(level, "%d of %d steps were left out, since their gradients were not finite", left_out, step)
        return vector.detach()

    def _gradient(self, vector: Tensor, part: Part) -> Tensor:
        """That of the mean divergence over the images of all processes."""
        rows = self._processes.sum(torch.tensor(float(len(part.images)), dtype=torch.float64, device="cpu"))
        total = self._whole(vector, part, max(rows.item(), 1.0)) if len(part.images) else torch.zeros_like(vector)
        if self._processes.several:
            total = self._processes.sum(total.cpu()).to(vector.device)
        return self._fitted * (total + 2 * PULL * vector.detach())

    def _whole(self, vector: Tensor, part: Part, count: float) -> Tensor:
        """The gradient of the sum over the images of `part`, divided by `count`; in pieces where memory ends."""
        while True:
            try:
                return sum(self._piece(vector, piece, count) for piece in part.split(self.micro_batch))
            except torch.OutOfMemoryError:
                if self.micro_batch == SMALLEST_MICRO_BATCH or part.inside is not None:
                    raise
                self.micro_batch = max(self.micro_batch // 2, SMALLEST_MICRO_BATCH)
                logger.info("out of memory: %d images at a time from here on", self.micro_batch)

    def _piece(self, vector: Tensor, part: Part, count: float) -> Tensor:
        view = part if self._augment is None else part.seen(self._augment)
        targets = self._targets(view)
        inputs = view.batch, targets, vector, torch.tensor(count, dtype=torch.float32, device="cpu")
        return self._recorded(view, *inputs) if view.plain else self._gradient_of(view, *inputs)

    def _gradient_of(self, part: Part, batch: Any, targets: Tensor, vector: Tensor, count: Tensor) -> Tensor:
        """That of the sum over the images of a part with this `batch`, divided by `count` ()."""
        rows = self._network.rows(dataclasses.replace(part, batch=batch), vector)
        per_image = len(rows) / len(part.images)
        loss = self._divergence(targets.to(rows.device), rows.to(compute_dtype(rows))).sum() / (per_image * count)
        (gradient,) = torch.autograd.grad(self._scale * loss, vector)
        return gradient / self._scale
