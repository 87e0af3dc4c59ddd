import pytest
import torch

from baselines.reconstruction.losses import reconstruction_error

from ..networks import SmallResNet, randomized


def error(network, inputs):
    with torch.no_grad():
        return (network(inputs) - randomized(SmallResNet())(inputs)).square().mean().item()


def test_reconstruction_error_takes_other_norms():
    output = torch.tensor([[1.0, -2.0]])
    error = reconstruction_error(output, torch.zeros(1, 2), 1, 2.4)
    assert error.item() == pytest.approx(1 + 2**2.4)


@pytest.mark.parametrize("axis", [1, -1])
def test_reconstruction_error_sums_channels_and_averages_the_rest(axis):
    output, target = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    assert reconstruction_error(output, target, axis).item() == (3 if axis == 1 else 4)


def test_weights_of_the_error_multiply_its_elements():
    output, weights = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.5]])
    assert reconstruction_error(output, torch.zeros(1, 2), 1, 2.0, weights).item() == pytest.approx(3 + 0.5 * 4)


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_gradient_of_the_error_equals_autograd_and_lies_as_the_output_does(norm, layout):
    output, target = (values(2, 3, 4, 4, seed=seed).to(memory_format=layout) for seed in (0, 1))
    output.requires_grad_()
    # through another operation, since the gradient of a leaf is laid out like the leaf anyway
    passed = output * 1
    passed.register_hook(lambda grad: strides.append(grad.stride()))
    strides = []
    error = reconstruction_error(passed, target, 1, norm)
    (mine,) = torch.autograd.grad(error, output)
    naive = (output - target).abs().pow(norm).sum(1).mean()
    torch.testing.assert_close(error, naive)
    torch.testing.assert_close(mine, torch.autograd.grad(naive, output)[0])
    assert strides == [output.stride()]
