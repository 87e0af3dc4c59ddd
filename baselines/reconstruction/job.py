"""All that a reconstruction starts from."""

from dataclasses import dataclass

import torch
from torch import nn

from baselines.network.units import Unit
from baselines.recipes import Recipe, Stage
from baselines.reconstruction.cache import Cached
from baselines.reconstruction.checkpoint import Checkpoint
from baselines.reconstruction.distribution_correction import Corrector


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run may choose beside the recipe: steps a unit and stage (None: as published), images a step, images a
    capturing pass."""

    iters: int | None
    batch_size: int
    capture_batch_size: int

    def iters_of(self, stage: Stage) -> int:
        """Steps a unit in `stage`."""
        return stage.iters if self.iters is None else self.iters


@dataclass(frozen=True)
class Job:
    """A network to reconstruct.

    Attributes:
        folded: the FP twin; same module names as `network`.
        network: the quantized network, with ranges set.
        units: in calling order.
        inputs: calibration inputs (N, ...).
        generator: of everything random; on the device of the networks.
        range_seconds: what the search for ranges has taken.
        corrector: of the units' FP inputs, if the recipe corrects them.
        checkpoint: where finished units are kept, and taken from.
    """

    folded: nn.Module
    network: nn.Module
    units: list[Unit]
    inputs: Cached
    recipe: Recipe
    settings: RunSettings
    generator: torch.Generator
    range_seconds: float
    corrector: Corrector | None = None
    checkpoint: Checkpoint | None = None
