import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from cat_plugin.fitting.divergence import cross_entropy, fit_class_divergence, fit_shared_divergence
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
