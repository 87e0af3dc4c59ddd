import pytest
import torch

from baselines.quantization.operations import coin_flips
from baselines.quantization.quantizers import ActivationQuantizer, _FusedQuantizeOrKeep, _QuantizeOrKeep


def straight_through(x, otherwise, scale, zero_point, levels, mask):
    """Independent reference: autograd through a detached rounding, LSQ-style."""
    steps = x / scale
    rounded = steps.round().detach() + (steps - steps.detach())  # in this order the integers stay exact
    clipped = rounded.detach().clamp(-zero_point, levels - zero_point)
    quantized = torch.where(clipped == rounded, rounded, clipped) * scale
    return torch.where(mask.bool(), quantized, otherwise)


@pytest.fixture
def quantizer():
    module = ActivationQuantizer(2)
    module.scale.data.fill_(0.37)
    module.zero_point.fill_(1.0)
    module.scale.requires_grad_(True)
    return module


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_hand_computed_values():
    module = ActivationQuantizer(2)
    module.scale.data.fill_(0.5)
    module.zero_point.fill_(1.0)
    x = torch.tensor([-3.0, -0.4, -0.2, 0.0, 0.3, 0.8, 9.0])
    assert module(x).tolist() == [-0.5, -0.5, 0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("constant", [True, False], ids=["otherwise-constant", "otherwise-x"])
def test_mix_and_its_gradients_equal_the_reference(quantizer, keep, constant):
    x, other, weight = (values(64, 30, seed=s) for s in range(3))
    x.requires_grad_(True)
    mask = coin_flips(x, keep, torch.Generator().manual_seed(7))
    with quantizer.training_with(keep, False, torch.Generator().manual_seed(7)):
        out = quantizer.mix(x, other if constant else None)
    (out * weight).sum().backward()
    actual = out.detach(), x.grad.clone(), quantizer.scale.grad.clone()
    x.grad = quantizer.scale.grad = None
    reference = straight_through(x, other if constant else x, quantizer.scale, 1.0, 3, mask)
    (reference * weight).sum().backward()
    for mine, theirs in zip(actual, (reference.detach(), x.grad, quantizer.scale.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_gradcheck_between_two_roundings():
    """In double precision and away from the jumps, the output is ``integer * scale``: linear in the scale."""
    x = torch.tensor([0.1, 0.5, 0.8, -0.3, 5.0, -7.0], dtype=torch.float64)
    scale = torch.tensor(0.37, dtype=torch.float64)
    out = [_QuantizeOrKeep.apply(x, None, scale + step, -1.0, 2.0, None) for step in (-1e-6, 1e-6)]
    slope = (out[1] - out[0]) / 2e-6
    scale.requires_grad_(True)
    _QuantizeOrKeep.apply(x, None, scale, -1.0, 2.0, None).sum().backward()
    inside = torch.tensor([True, True, True, True, False, False])
    # LSQ's gradient inside the range is that of the slope less x / scale, which stands for the moving roundings.
    torch.testing.assert_close(scale.grad, (slope - torch.where(inside, x / 0.37, 0.0)).sum())


def test_quantizer_is_plain_again_after_training_even_if_it_raises(quantizer):
    x = values(20)
    with torch.no_grad():
        before = quantizer(x)
    with pytest.raises(RuntimeError), quantizer.training_with(0.5, True, torch.Generator()):
        raise RuntimeError
    with torch.no_grad():
        assert torch.equal(quantizer(x), before)


def test_outside_of_reconstruction_a_scale_that_takes_gradients_changes_no_value(quantizer):
    x = values(20)
    with torch.no_grad():
        before = quantizer(x)
    assert torch.equal(quantizer(x), before)


def test_gradients_pass_a_quantizer_whose_scale_is_not_learned():
    module = ActivationQuantizer(2)
    x = torch.tensor([-9.0, 0.2, 1.4, 9.0], requires_grad=True)
    with module.training_with(1.0, False, torch.Generator()):
        module(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_kernel_quantizes_and_differentiates_as_the_reference(replaced, masked):
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(4, 5, 6, 7, generator=generator) for _ in range(2))
    x = x.to(memory_format=torch.channels_last)
    kept = torch.rand(x.shape, generator=generator) < 0.5 if masked or replaced else None
    found = []
    for fused in (True, False):
        values, scale = x.clone().requires_grad_(), torch.tensor(0.13, requires_grad=True)
        otherwise = other if replaced else values
        if fused:
            out = _FusedQuantizeOrKeep.apply(values, other if replaced else None, scale, -3.0, 15, kept)
        else:
            mask = torch.ones_like(x) if kept is None else ~kept
            out = straight_through(values, otherwise, scale, 3, 15, mask)
        (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
        found.append((out.detach(), values.grad, scale.grad))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
