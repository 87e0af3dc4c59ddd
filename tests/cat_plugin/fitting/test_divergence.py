import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, softmax

from cat_plugin.fitting.divergence import (
    LARGEST_SPREAD,
    LEAST_SPREAD,
    best_scale,
    cross_entropy,
    fit_class_divergence,
    fit_shared_divergence,
    softened_divergence,
)
from cat_plugin.kinds import SIGMOID, SOFTMAX
from tests.cat_plugin.helpers import paired_logits

TEMPERATURE, PRIOR = 1.7, 3.0


@pytest.fixture(scope="module")
def logits():
    q, f = paired_logits(60, 4)
    return q, (f / TEMPERATURE).softmax(dim=1)


def naive_divergence(out, teacher):
    """Mean KL(teacher || softmax(out / T)), image by image."""
    total = 0.0
    for row, target in zip(out.tolist(), teacher.tolist(), strict=True):
        exponentials = [np.exp(value / TEMPERATURE) for value in row]
        total += sum(t * np.log(t * sum(exponentials) / e) for t, e in zip(target, exponentials, strict=True))
    return total / len(out)


def test_cross_entropy_and_its_gradient(logits):
    q, teacher = logits
    value, gradient = cross_entropy(q / TEMPERATURE, teacher)
    entropy = -(teacher * teacher.log()).sum(dim=1).mean()
    assert value.item() == pytest.approx(naive_divergence(q, teacher) + entropy.item())
    leaf = (q / TEMPERATURE).requires_grad_()
    torch.nn.functional.cross_entropy(leaf, teacher).backward()
    torch.testing.assert_close(gradient, leaf.grad)


def test_shared_map_equals_a_naive_minimisation(logits):
    q, teacher = logits
    z = torch.cat([q[:, :2] - 1, torch.ones(60, 1)], dim=1)

    def objective(flat):
        coefficients = torch.from_numpy(flat.reshape(3, 4))
        return naive_divergence(q + z @ coefficients, teacher) + PRIOR / 120 * (flat**2).sum() / TEMPERATURE**2

    expected = minimize(objective, np.zeros(12), method="BFGS", options={"gtol": 1e-7}).x.reshape(3, 4)
    coefficients = fit_shared_divergence(z, q, teacher, TEMPERATURE, PRIOR)
    torch.testing.assert_close(coefficients, torch.from_numpy(expected), atol=2e-4, rtol=0)


def test_class_map_equals_a_naive_minimisation(logits):
    q, teacher = logits
    mean, std = q.numpy().mean(axis=0), q.numpy().std(axis=0)

    def out(flat):
        slope, offset = flat.reshape(2, 4)
        return q + torch.from_numpy(slope * (q.numpy() - mean) / std + offset)

    def objective(flat):
        return naive_divergence(out(flat), teacher) + PRIOR / 120 * (flat**2).sum() / TEMPERATURE**2

    found = minimize(objective, np.zeros(8), method="BFGS", options={"gtol": 1e-7}).x
    scale, shift = fit_class_divergence(q, teacher, TEMPERATURE, PRIOR)
    torch.testing.assert_close(q * scale + shift, out(found), atol=5e-4, rtol=0)


def test_teacher_that_is_met_already_asks_for_nothing(logits):
    q, _ = logits
    scale, shift = fit_class_divergence(q, (q / TEMPERATURE).softmax(dim=1), TEMPERATURE, PRIOR)
    torch.testing.assert_close(scale, torch.ones(4).double())
    torch.testing.assert_close(shift, torch.zeros(4).double())


def softened_reference(logits, teacher):
    """(N,) cross-entropies at the scale of all logits that makes their mean smallest."""

    def at(log_scale):
        return -(teacher.numpy() * log_softmax(math.exp(log_scale) * logits.numpy(), axis=1)).sum(axis=1)

    found = minimize_scalar(lambda log_scale: at(log_scale).mean(), bracket=(-2, 0), tol=1e-10)
    return torch.from_numpy(at(found.x)), math.exp(found.x)


def test_softened_divergence_is_at_the_scale_that_suits_the_logits():
    q, f = paired_logits(80, 6)
    teacher = (f / TEMPERATURE).softmax(dim=1)
    torch.testing.assert_close(teacher, torch.from_numpy(softmax(f.numpy() / TEMPERATURE, axis=1)))
    expected, scale = softened_reference(q, teacher)
    found = softened_divergence(q, teacher, TEMPERATURE)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(softened_divergence(7 * q, teacher, TEMPERATURE), found, atol=1e-3, rtol=1e-2)
    assert best_scale(q, teacher) == pytest.approx(scale, rel=2e-3)
    assert best_scale(1000 * q, teacher) == pytest.approx(scale / 1000, rel=2e-3)


@pytest.mark.parametrize("kind", [SOFTMAX, SIGMOID], ids=lambda kind: kind.name)
@pytest.mark.parametrize("times", [0.02, 1.0, 50.0])
def test_scale_is_the_one_that_a_search_finds(kind, times):
    q, f = paired_logits(80, 6)
    teacher = kind.means(f / TEMPERATURE)
    losses = [kind.loss(math.exp(step / 500) * q, teacher).mean().item() for step in range(-4000, 4000)]
    expected = math.exp((np.argmin(losses) - 4000) / 500)
    assert best_scale(times * q, teacher, kind) == pytest.approx(expected / times, rel=3e-3)
    if kind is SOFTMAX:  # the same is added to all classes, which says nothing
        assert best_scale(times * q + 1e5, teacher, kind) == pytest.approx(expected / times, rel=3e-3)


def test_scale_stays_within_its_bounds_where_more_is_always_better():
    q = torch.eye(6, dtype=torch.float64) - 1 / 6
    spread = q.square().mean().sqrt().item()
    largest = best_scale(q, torch.eye(6).double())
    assert largest <= LARGEST_SPREAD / spread and SOFTMAX.loss(largest * q, torch.eye(6).double()).max() < 1e-9
    assert best_scale(-q, torch.eye(6).double()) == pytest.approx(LEAST_SPREAD / spread, rel=1e-2)


def test_maps_do_not_depend_on_how_many_rows_are_worked_on_at_a_time(logits, monkeypatch):
    q, teacher = logits
    z = torch.cat([q[:, :2], torch.ones(60, 1)], dim=1)

    def found():
        return [fit_shared_divergence(z, q, teacher, TEMPERATURE, PRIOR), *fit_class_divergence(q, teacher, 1.0, PRIOR)]

    at_once = found()
    monkeypatch.setattr("cat_plugin.fitting.divergence.VALUES_AT_ONCE", 28)  # seven of 60 rows
    for part, whole in zip(found(), at_once, strict=True):
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)
    assert best_scale(q, teacher) == pytest.approx(softened_reference(q, teacher)[1], rel=2e-3)


@pytest.mark.parametrize("logits", [torch.ones(9, 4), torch.arange(9.0).reshape(9, 1)], ids=["alike", "one class"])
def test_logits_that_are_all_alike_have_no_scale(logits):
    teacher = torch.full_like(logits, 1 / logits.shape[1])
    assert best_scale(logits.double(), teacher.double()) == 1.0
