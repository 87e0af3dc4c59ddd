"""The three kinds of outputs against formulas written out for one number at a time."""

import math

import pytest
import torch

from cat_plugin.kinds import KINDS, SIGMOID, SOFTMAX, VALUE


def outputs(seed=0, shape=(7, 5)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def naive_divergence(name, f, out):
    if name == "value":
        return sum((b - a) ** 2 / 2 for a, b in zip(f, out, strict=True))
    if name == "softmax":
        p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (f, out))
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    total = 0.0
    for a, b in zip(f, out, strict=True):
        p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total


@pytest.mark.parametrize("name", KINDS)
def test_divergence_is_the_naive_one(name):
    f, out = outputs(), outputs(1)
    expected = [naive_divergence(name, a, b) for a, b in zip(f.tolist(), out.tolist(), strict=True)]
    torch.testing.assert_close(KINDS[name].divergence(f, out), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", KINDS)
def test_means_and_quadratic_are_derivatives_of_the_partition(name):
    kind, out = KINDS[name], outputs().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(kind.partition(out).sum(), out)[0], kind.means(out))
    direction = outputs(2)
    for row, along, found in zip(out.detach(), direction, kind.quadratic(kind.means(out), direction), strict=True):
        hessian = torch.autograd.functional.hessian(lambda x: kind.partition(x.unsqueeze(0)).sum(), row)
        torch.testing.assert_close(found, along @ hessian @ along)


def test_what_is_predicted():
    out = torch.tensor([[0.5, 2.0, -1.0], [-3.0, -2.0, -1.0]])
    assert SOFTMAX.decisions(out).tolist() == [[1], [2]]
    assert SIGMOID.decisions(out).tolist() == [[1, 1, 0], [0, 0, 0]]
    assert VALUE.decisions is None
    assert SIGMOID.agreeing(out, -out).tolist() == [[False] * 3, [False] * 3]


@pytest.mark.parametrize(("name", "moves"), [("softmax", False), ("sigmoid", True), ("value", True)])
def test_what_all_outputs_have_in_common(name, moves):
    out = outputs()
    same = torch.allclose(KINDS[name].centred(out + 3), KINDS[name].centred(out))
    assert same != moves
