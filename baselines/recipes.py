"""The published methods as data: one engine (:mod:`baselines.reconstruct`) runs them all and never sees a name."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One optimisation over a unit.

    Attributes:
        rounding: learn how each weight is rounded.
        activation_scales: learn the scales of the activation quantizers.
        quantize_activations: whether activations are quantized during the stage.
    """

    rounding: bool = False
    activation_scales: bool = False
    quantize_activations: bool = True


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is reconstructed; no stage means that weights are rounded to nearest.

    Attributes:
        unit: ``"layer"`` or ``"block"``.
        stages: run one after the other on each unit.
        keep_probability: probability that an element of an activation is quantized during reconstruction; the others
            take the FP value (1: always quantized).
        iters: optimiser steps a unit and stage.
        rounding_lr, scale_lr: Adam's learning rates; that of the scales falls to zero along a cosine. That of the
            roundings is for ``iters`` steps, see :meth:`rounding_lr_for`.
        max_rounding_lr: what shorter runs may raise it to.
        penalty_weight: of the rounding penalty, against the reconstruction error.
        warm_up: share of the steps without rounding penalty.
        beta: first and last exponent of the rounding penalty.
    """

    unit: str = "block"
    stages: tuple[Stage, ...] = ()
    keep_probability: float = 1.0
    iters: int = 20_000
    rounding_lr: float = 1e-3
    max_rounding_lr: float = 0.1
    scale_lr: float = 4e-5
    penalty_weight: float = 0.01
    warm_up: float = 0.2
    beta: tuple[float, float] = field(default=(20.0, 2.0))

    def rounding_lr_for(self, iters: int) -> float:
        """The roundings' learning rate in a run of ``iters`` steps.

        Adam moves a parameter by about its learning rate a step. At the published rate, a run much shorter than the
        published one ends before the roundings have got to 0 or 1, and hardening them undoes what was learned; so a
        shorter run gets a rate that takes them as far.
        """
        return min(self.rounding_lr * max(1.0, self.iters / iters), max(self.rounding_lr, self.max_rounding_lr))


RTN = Recipe(stages=())
"""Round to nearest, ranges by search: what every method starts from."""

QDROP = Recipe(
    unit="block",
    stages=(Stage(rounding=True, activation_scales=True),),  # arXiv 2203.05740, algorithm 1: both together
    keep_probability=0.5,  # section 4.3
    iters=20_000,  # appendix, implementation details
    rounding_lr=1e-3,  # authors' code: Adam's default
    scale_lr=4e-5,  # authors' configuration files
    penalty_weight=0.01,
    warm_up=0.2,
    beta=(20.0, 2.0),  # as BRECQ
)
"""QDrop: blocks, activations randomly left in floating point."""

RECIPES = MappingProxyType({"rtn": RTN, "qdrop": QDROP})
