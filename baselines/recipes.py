"""The published methods as data: one engine (:mod:`baselines.reconstruct`) runs them all and never sees a name."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One walk through all units, with one optimisation on each.

    Attributes:
        rounding: learn how each weight is rounded.
        activation_scales: learn the scales of the activation quantizers.
        quantize_activations: whether activations are quantized during the stage.
        iters: optimiser steps a unit.
        error_norm: exponent of the reconstruction error.
        rounding_lr, scale_lr: Adam's learning rates; that of the scales falls to zero along a cosine. That of the
            roundings is for ``iters`` steps, see :meth:`rounding_lr_for`.
        max_rounding_lr: what shorter runs may raise it to.
    """

    rounding: bool = False
    activation_scales: bool = False
    quantize_activations: bool = True
    iters: int = 20_000
    error_norm: float = 2.0
    rounding_lr: float = 1e-3
    max_rounding_lr: float = 0.1
    scale_lr: float = 4e-5

    def rounding_lr_for(self, iters: int) -> float:
        """The roundings' learning rate in a run of ``iters`` steps.

        Adam moves a parameter by about its learning rate a step. At the published rate, a run much shorter than the
        published one ends before the roundings have got to 0 or 1, and hardening them undoes what was learned; so a
        shorter run gets a rate that takes them as far.
        """
        return min(self.rounding_lr * max(1.0, self.iters / iters), max(self.rounding_lr, self.max_rounding_lr))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is reconstructed; no stage means that weights are rounded to nearest.

    Attributes:
        unit: ``"layer"`` or ``"block"``.
        stages: run one after the other on the whole network.
        keep_probability: probability that an element of an activation is quantized during reconstruction; the others
            take the FP value (1: always quantized).
        penalty_weight: of the rounding penalty, against the reconstruction error.
        warm_up: share of the steps without rounding penalty.
        beta: first and last exponent of the rounding penalty.
    """

    unit: str = "block"
    stages: tuple[Stage, ...] = ()
    keep_probability: float = 1.0
    penalty_weight: float = 0.01
    warm_up: float = 0.2
    beta: tuple[float, float] = field(default=(20.0, 2.0))


RTN = Recipe(stages=())
"""Round to nearest, ranges by search: what every method starts from."""

ADAROUND = Recipe(
    unit="layer",
    # arXiv 2004.10568, section 5: 10,000 iterations, Adam with its default rate, activations in floating point
    stages=(Stage(rounding=True, quantize_activations=False, iters=10_000, rounding_lr=1e-3),),
    penalty_weight=0.01,  # this and the next two as in the authors' toolkit, AIMET
    warm_up=0.2,
    beta=(20.0, 2.0),
)
"""AdaRound: layer by layer, inputs from the quantized layers before, the activation behind a layer included."""

BRECQ = Recipe(
    unit="block",
    stages=(  # arXiv 2102.05426; the numbers are the defaults of the authors' main_imagenet.py
        Stage(rounding=True, quantize_activations=False, iters=20_000, rounding_lr=1e-3),
        Stage(activation_scales=True, iters=5_000, error_norm=2.4, scale_lr=4e-4),
    ),
    penalty_weight=0.01,
    warm_up=0.2,
    beta=(20.0, 2.0),
)
"""BRECQ: block by block, the roundings of the whole network first, then all activation scales."""

QDROP = Recipe(
    unit="block",
    # arXiv 2203.05740, algorithm 1: both together; the numbers are those of the authors' configuration files
    stages=(Stage(rounding=True, activation_scales=True, iters=20_000, rounding_lr=1e-3, scale_lr=4e-5),),
    keep_probability=0.5,
    penalty_weight=0.01,
    warm_up=0.2,
    beta=(20.0, 2.0),
)
"""QDrop: blocks, activations randomly left in floating point."""

RECIPES = MappingProxyType({"rtn": RTN, "adaround": ADAROUND, "brecq": BRECQ, "qdrop": QDROP})
