import pytest
import torch

from baselines.reconstruction.rounding_regulariser import annealed_beta, rounding_penalty_slope


@pytest.mark.parametrize(
    ("step", "beta"),
    [(0, None), (19, None), (20, 20.0), (60, 11.0), (100, 2.0)],
)
def test_annealed_beta_follows_the_authors_schedule(step, beta):
    assert annealed_beta(step, 100, 0.2, 20.0, 2.0) == beta


@pytest.mark.parametrize("beta", [2.0, 5.5])
def test_rounding_penalty_slope_is_the_derivative(beta):
    fraction = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64, requires_grad=True)
    (1 - (2 * fraction - 1).abs() ** beta).sum().backward()
    torch.testing.assert_close(rounding_penalty_slope(fraction.detach(), beta), fraction.grad)
