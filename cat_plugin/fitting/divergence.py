"""The divergence of corrected from full-precision predictions (Kullback-Leibler), and maps that minimise it."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cat_plugin.kinds import SOFTMAX, VALUE, OutputKind

MAX_STEPS = 40
VALUES_AT_ONCE = 2**16
"""How many numbers are worked on at a time, so that a processor keeps them near."""
LEAST_SPREAD, LARGEST_SPREAD = 0.01, 1000.0
"""Of outputs, standard deviation: between what predicts all classes alike and what predicts one alone."""
SCALE_STEPS, SCALE_ERROR = 30, 1e-3
"""Of Newton's method for a scale, and the relative step after which it is near enough: the next would be its square."""


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
    scaled, penalty = start / temperature, prior / len(z)

    def value_and_gradient(coefficients: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = penalty / 2 * coefficients.square().sum(), penalty * coefficients
        for rows in _parts(teacher):
            part, slope = cross_entropy(torch.addmm(scaled[rows], z[rows], coefficients), teacher[rows], kind)
            share = len(slope) / len(z)
            value += share * part
            gradient.addmm_(z[rows].T, slope, alpha=share)
        return value, gradient

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
    mean, std = q.mean(dim=0), q.std(dim=0, correction=0).clamp(min=1e-4)
    standard, scaled, penalty = (q - mean) / std, q / temperature, prior / len(q)

    def value_and_gradient(parameters: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = penalty / 2 * parameters.square().sum(), penalty * parameters
        for rows in _parts(teacher):
            outputs = (scaled[rows] + parameters[1]).addcmul_(standard[rows], parameters[0])
            part, slope = cross_entropy(outputs, teacher[rows], kind)
            share = len(slope) / len(q)
            value += share * part
            gradient[1] += share * slope.sum(dim=0)
            gradient[0] += share * slope.mul_(standard[rows]).sum(dim=0)
        return value, gradient

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
    """The factor of `outputs` (N, C) that brings predictions nearest to `teacher` on average; of values, 1.

    The mean loss is convex in the factor: Newton's method, within the bounds that slopes have set.
    """
    outputs = kind.centred(outputs)
    spread = outputs.square().mean().sqrt().item()
    if kind is VALUE or not 1e-12 < spread < math.inf:
        return 1.0  # all classes alike, as where there is but one: no factor changes a prediction
    low, high = LEAST_SPREAD / spread, LARGEST_SPREAD / spread
    scale = min(max(1.0, low), high)
    for _ in range(SCALE_STEPS):
        slope, curvature = _slope_and_curvature(scale, outputs, teacher, kind)
        low, high = (scale, high) if slope < 0 else (low, scale)
        step = scale - slope / curvature if curvature > 0 else math.nan
        if not low < step < high:  # nowhere, too, where all curvature is lost
            step = math.sqrt(low * high)
        scale, before = step, scale
        if abs(scale - before) <= SCALE_ERROR * before:
            break
    return scale


def _slope_and_curvature(scale: float, outputs: Tensor, teacher: Tensor, kind: OutputKind) -> tuple[float, float]:
    """First and second derivative of the mean loss of `scale * outputs` by the scale."""
    slope = curvature = 0.0
    for rows in _parts(outputs):
        part = outputs[rows]
        means = kind.means(scale * part)
        slope += ((means - teacher[rows]) * part).sum().item()
        curvature += kind.quadratic(means, part).sum().item()
    return slope / len(outputs), curvature / len(outputs)


def _parts(values: Tensor) -> Iterator[slice]:
    """Rows of (N, C), so many at a time that their numbers are `VALUES_AT_ONCE`."""
    step = max(VALUES_AT_ONCE // values.shape[1], 1)
    return (slice(start, start + step) for start in range(0, len(values), step))


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
