"""The published methods as data: one engine (`baselines.reconstruction`) runs them all and never sees a name.

In all of them, a block quantizes what it reads. The authors' codes quantize what a block gives, and learn the scale of
that quantizer with the block; here it belongs to the next one.
"""

from dataclasses import dataclass, field, replace
from types import MappingProxyType

ERROR_WEIGHTINGS = ("none", "fisher")
"""All alike, or by the diagonal Fisher information, see `baselines.reconstruction.rest_of_network.fisher_weights`."""

FEWER_CLASSES = 0.3
"""Exponent in `Prediction.weight_for`: from the published 10 at 1,000 classes to 2.4 at ten, where about 2.5 was
the best of 1, 2.5 and 5 (ResNet-20 on CIFAR-10, W2A2, other training images than those of the calibration)."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One walk through all units, with one optimisation on each.

    Attributes:
        rounding: learn how each weight is rounded.
        activation_scales: learn the scales of the activation quantizers.
        quantize_activations: whether activations are quantized during the stage.
        fp_inputs: units get what the FP network hands them, instead of the inputs that the quantized units before make.
        iters: optimiser steps a unit.
        error_norm: exponent of the reconstruction error.
        rounding_lr, scale_lr: Adam's learning rates; that of the scales falls to zero along a cosine. That of the
            roundings is for `iters` steps, see `rounding_lr_for`.
        max_rounding_lr: what shorter runs may raise it to.
    """

    rounding: bool = False
    activation_scales: bool = False
    quantize_activations: bool = True
    fp_inputs: bool = False
    iters: int = 20_000
    error_norm: float = 2.0
    rounding_lr: float = 1e-3
    max_rounding_lr: float = 0.1
    scale_lr: float = 4e-5

    @property
    def learns_scales(self) -> bool:
        """Whether scales are learned: those of quantizers that are at work."""
        return self.activation_scales and self.quantize_activations

    def rounding_lr_for(self, iters: int) -> float:
        """The roundings' learning rate in a run of `iters` steps.

        Adam moves a parameter by about its learning rate a step. At the published rate, a run much shorter than the
        published one ends before the roundings have got to 0 or 1, and hardening them undoes what was learned; so a
        shorter run gets a rate that takes them as far.
        """
        return min(self.rounding_lr * max(1.0, self.iters / iters), max(self.rounding_lr, self.max_rounding_lr))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A second loss beside the reconstruction error: how far a unit's output moves the network's prediction.

    The unit gets the quantized input, unmixed, the rest of the network is FP; see
    `baselines.reconstruction.losses.prediction_difference`.

    Attributes:
        weight: against the reconstruction error.
        classes: the number of classes that `weight` is for, see `weight_for`.
        temperature: what the logits are divided by.
        share: of a batch's images for which it is computed.
    """

    weight: float
    temperature: float
    classes: int | None = None
    share: float = 1.0

    def weight_for(self, classes: int) -> float:
        """The weight for a network of `classes` classes: that of the recipe, less where there are fewer classes.

        A prediction of C classes is C - 1 numbers. Those of few classes on the same number of images are soon learned
        by heart, for the unit has as many parameters as ever; so the weight falls with a power of their number.
        """
        if self.classes is None:
            return self.weight
        return self.weight * min(1.0, (max(classes - 1, 1) / (self.classes - 1)) ** FEWER_CLASSES)


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Of the units' FP inputs, to the statistics of batch norms: `baselines.reconstruction.distribution_correction`.

    Attributes:
        closeness: weight of the squared distance from what they were.
        steps, lr: of Adam on the inputs; the rate falls to zero along a cosine.
    """

    closeness: float
    steps: int
    lr: float


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is reconstructed; no stage means that weights are rounded to nearest.

    Attributes:
        unit: `"layer"` or `"block"`.
        stages: run one after the other on the whole network.
        keep_probability: probability that an element of an activation is quantized during reconstruction; the others
            take the FP value (1: always quantized).
        penalty_weight: of the rounding penalty, against the reconstruction error.
        warm_up: share of the steps without rounding penalty.
        beta: first and last exponent of the rounding penalty.
        prediction: the loss behind the rest of the network, if any.
        correction: of the FP inputs, if any.
        error_weighting: of the elements of the reconstruction error, one of `ERROR_WEIGHTINGS`.
        version: raised whenever the method comes to other results, see `baselines.versions`.
    """

    unit: str = "block"
    stages: tuple[Stage, ...] = ()
    keep_probability: float = 1.0
    penalty_weight: float = 0.01
    warm_up: float = 0.2
    beta: tuple[float, float] = field(default=(20.0, 2.0))
    prediction: Prediction | None = None
    correction: Correction | None = None
    error_weighting: str = "none"
    version: int = 1

    @property
    def looks_ahead(self) -> bool:
        """Whether predictions of the whole network are needed, image by image."""
        return self.prediction is not None or self.error_weighting != "none"

    def __post_init__(self) -> None:
        if self.error_weighting not in ERROR_WEIGHTINGS:
            known = ", ".join(ERROR_WEIGHTINGS)
            raise ValueError(f"error_weighting={self.error_weighting!r} should be one of {known}")


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
        # This stage reads the FP network's inputs, as the authors' does. With those of the quantized network, ResNet-20
        # at W2A2 and 1,000 steps falls from 73.4 to 65.6 on other training images of CIFAR-10.
        Stage(activation_scales=True, fp_inputs=True, iters=5_000, error_norm=2.4, scale_lr=4e-4),
    ),
    penalty_weight=0.01,
    warm_up=0.2,
    beta=(20.0, 2.0),
)
"""BRECQ: block by block, the roundings of the whole network first, then all activation scales.

The authors' code takes the ranges of activations, where that stage starts, from the network with rounded weights; here
they come from the FP network, as for all methods."""

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

PD_QUANT = replace(
    QDROP,  # which the authors' code is built on
    # arXiv 2212.07048; weight 1 / lamb_r and T are the defaults of the authors' main_imagenet.py, for 1,000 classes.
    # On CIFAR-10 it learns the calibration images by heart, hence weight_for. ResNet-20, W2A2, 1,000 steps, top-1 and
    # KL to the FP predictions on 10,000 other training images: QDrop 83.9 and .362; without correction, weight 1
    # 83.8 and .362, 2.5 84.2 and .354, 5 83.9 and .365; weight 2.5 with correction 84.2 and .358.
    # The authors take the whole batch and 500 steps of correction. Half and 10 steps take 2.8 times as long as QDrop, a
    # quarter and 4 steps twice. ResNet-20 at W2A2 on 10,000 other training images: 83.8 and .363 with the former, mean
    # of three networks, 83.6 and .366 with the latter, of six; standard errors are .2 and .004. On test images 80.4
    # and 80.0, three each.
    prediction=Prediction(weight=10.0, classes=1000, temperature=4.0, share=0.25),
    # closeness is 1 / lamb_c of the same file. The authors' rate is constant, 0.001; 10 steps at 50 times the rate,
    # falling to zero, go as far as theirs and reach the same loss within 3 % (ResNet-20, training images, with
    # statistics of single images); 4 steps go .7 to 1.3 times as far as 10, unit by unit (with those of batches).
    correction=Correction(closeness=50.0, steps=4, lr=0.05),
    version=4,
)
"""PD-Quant: QDrop, with the effect on the network's prediction as a second loss and FP inputs corrected to the
statistics of batch norms."""

RECIPES = MappingProxyType({"rtn": RTN, "adaround": ADAROUND, "brecq": BRECQ, "qdrop": QDROP, "pd_quant": PD_QUANT})
