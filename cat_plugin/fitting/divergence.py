"""The divergence of corrected from full-precision predictions (Kullback-Leibler), and maps that minimise it."""

import math
from collections.abc import Callable

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from cat_plugin.kinds import SOFTMAX, VALUE, OutputKind

MAX_STEPS = 40


def fit_shared_divergence(
    z: Tensor, start: Tensor, teacher: Tensor, temperature: float, prior: float, kind: OutputKind = SOFTMAX
) -> Tensor:
    """Linear map of features, added to other logits, that brings predictions near the teacher's.

    Minimises `mean KL(teacher || softmax((start + z @ coefficients) / temperature))` plus
    `prior / (2 N) * |coefficients / temperature|^2`.

    Args:
        z: (N, R) float64 features; a column of ones gives an offset.
        start: (N, C) float64 logits that the result is added to.
        teacher: (N, C) float64 probabilities, softened by the same temperature.

    Returns:
        coefficients (R, C).
    """
    n_images = len(z)
    scaled = start / temperature

    def value_and_gradient(coefficients: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = cross_entropy(torch.addmm(scaled, z, coefficients), teacher, kind)
        penalty = prior / n_images
        return value + penalty / 2 * coefficients.square().sum(), z.T @ slope + penalty * coefficients

    return temperature * _minimise(value_and_gradient, z.new_zeros(z.shape[1], start.shape[1]))


def fit_class_divergence(
    q: Tensor, teacher: Tensor, temperature: float, prior: float, kind: OutputKind = SOFTMAX
) -> tuple[Tensor, Tensor]:
    """Scale and shift of every class, pulled to the identity, that bring predictions near the teacher's.

    Minimises the same divergence of `q + slope * (q - mean) / std + offset`, with the same penalty on slope and offset.

    Args:
        q: (N, C) float64 logits of the quantized model.
        teacher: (N, C) float64 probabilities, softened by `temperature`.

    Returns:
        scale (C,) and shift (C,).
    """
    n_images = len(q)
    mean, std = q.mean(dim=0), q.std(dim=0, correction=0).clamp(min=1e-4)
    standard, scaled = (q - mean) / std, q / temperature

    def value_and_gradient(parameters: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = cross_entropy((scaled + parameters[1]).addcmul_(standard, parameters[0]), teacher, kind)
        gradient = torch.stack([(standard * slope).sum(dim=0), slope.sum(dim=0)])
        penalty = prior / n_images
        return value + penalty / 2 * parameters.square().sum(), gradient + penalty * parameters

    slope, offset = temperature * _minimise(value_and_gradient, q.new_zeros(2, q.shape[1]))
    return 1 + slope / std, offset - slope * mean / std


def cross_entropy(outputs: Tensor, teacher: Tensor, kind: OutputKind = SOFTMAX) -> tuple[Tensor, Tensor]:
    """Mean loss of `outputs` against the means `teacher`, both (N, C), and its gradient by the outputs."""
    partition, means = kind.partition_and_means(outputs)
    inner = torch.dot(teacher.reshape(-1), outputs.reshape(-1)) / len(outputs)
    return partition.mean() - inner, (means - teacher).div_(len(outputs))


def softened_divergence(output: Tensor, teacher: Tensor, temperature: float, kind: OutputKind = SOFTMAX) -> Tensor:
    """(N,) loss of predictions against the teacher's, (N, C), softened by the same temperature, at the scale of
    `output` (N, C) that makes its mean smallest."""
    scaled = output / temperature
    return kind.loss(best_scale(scaled, teacher, kind) * scaled, teacher)


def best_scale(outputs: Tensor, teacher: Tensor, kind: OutputKind = SOFTMAX) -> float:
    """The factor of `outputs` (N, C) that brings predictions nearest to `teacher` on average; of values, 1."""
    spread = kind.centred(outputs).square().mean().sqrt().item()
    if kind is VALUE or not spread > 1e-12:
        return 1.0  # all classes alike, as where there is but one: no factor changes a prediction
    inner, unit = (teacher * outputs).sum(dim=1).mean(), math.log(spread)

    def loss(log_scale: float) -> float:
        return (kind.partition_and_means(math.exp(log_scale) * outputs)[0].mean() - math.exp(log_scale) * inner).item()

    bounds = math.log(0.01) - unit, math.log(1000) - unit
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-3}).x)


def _minimise(value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor) -> Tensor:
    """The minimum of a convex function by L-BFGS."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=MAX_STEPS, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-10
    )

    def closure() -> Tensor:
        value, parameters.grad = value_and_gradient(parameters.detach())
        return value

    optimizer.step(closure)
    return parameters.detach()
