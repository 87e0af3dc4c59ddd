import pytest
import torch

from baselines.quantization.quantizers import (
    ActivationQuantizer,
    Rounding,
    WeightQuantizer,
    _QuantizeOrKeep,
    coin_flips,
)


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


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_coin_flips_are_fair_and_seeded(probability):
    def flip():
        generator = torch.Generator().manual_seed(5)
        return coin_flips(torch.empty(101, 203), probability, generator)

    flips = flip()
    assert set(flips.unique().tolist()) <= {0.0, 1.0}
    assert abs(flips.mean().item() - probability) < 0.015
    assert torch.equal(flips, flip())


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


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_soft_rounding_starts_at_the_fp_weights_where_nothing_is_clipped(bits):
    weight = values(4, 3, 3, 3)
    quantizer = WeightQuantizer(weight, bits, "minmax")
    (soft,) = Rounding([weight], [quantizer]).weights
    ends = [quantizer.dequantize(torch.tensor(float(integer))) for integer in (0, quantizer.levels)]
    inside = (weight >= ends[0]) & (weight <= ends[1])  # zero is on the grid, which moves its ends a little
    torch.testing.assert_close(soft[inside], weight[inside], rtol=0, atol=1e-5)
    assert inside.float().mean() > 0.9


@pytest.mark.parametrize("bits", [2, 3])
def test_hard_weights_lie_on_the_grid_and_start_as_round_to_nearest(bits):
    weights = [values(4, 3, 3, 3), values(5, 7, seed=1)]
    quantizers = [WeightQuantizer(w, bits) for w in weights]
    for hard, weight, quantizer in zip(Rounding(weights, quantizers).hard(), weights, quantizers, strict=True):
        integers = hard / quantizer.scale + quantizer.zero_point
        torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-4)
        assert integers.round().min() >= 0 and integers.round().max() <= 2**bits - 1
        torch.testing.assert_close(hard, quantizer(weight))


def soft_weight_and_penalty(logit, weight, quantizer, beta):
    """Independent reference: AdaRound's formulas as they are printed, for autograd."""
    fraction = (torch.sigmoid(logit) * 1.2 - 0.1).clamp(0, 1)
    floor = (weight / quantizer.scale).floor() + quantizer.zero_point
    soft = ((floor + fraction).clamp(0, quantizer.levels) - quantizer.zero_point) * quantizer.scale
    return soft, (1 - (2 * fraction - 1).abs() ** beta).sum()


@pytest.mark.parametrize("beta", [None, 20.0, 2.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_soft_weights_and_their_gradient_equal_the_reference(beta, layout):
    weights = [values(4, 3, 2, 3).to(memory_format=layout), values(5, 7, seed=1)]
    quantizers = [WeightQuantizer(weight, 2) for weight in weights]  # the search clips some weights
    rounding = Rounding(weights, quantizers)
    with torch.no_grad():
        rounding.logit.add_(values(len(rounding.logit), seed=2), alpha=3)  # some beyond the stretched sigmoid's ends
    rounding.soften()
    directions = [values(*weight.shape, seed=3) for weight in weights]
    sum((w * d).sum() for w, d in zip(rounding.weights, directions, strict=True)).backward()
    rounding.backward(0.3, beta)

    logits = rounding.logit.detach().split([w.numel() for w in weights])
    if layout == torch.channels_last:
        logits = logits[0].view(4, 2, 3, 3).permute(0, 3, 1, 2), logits[1].view(5, 7)
    else:
        logits = logits[0].view(4, 3, 2, 3), logits[1].view(5, 7)
    logits = [logit.clone().requires_grad_() for logit in logits]
    total = 0.0
    for logit, weight, quantizer, mine, direction in zip(
        logits, weights, quantizers, rounding.weights, directions, strict=True
    ):
        soft, penalty = soft_weight_and_penalty(logit, weight, quantizer, beta or 1.0)
        torch.testing.assert_close(mine.detach(), soft.detach())
        total = total + (soft * direction).sum() + (0.3 * penalty if beta else 0.0)
    total.backward()
    flat = [logits[0].grad.permute(0, 2, 3, 1) if layout == torch.channels_last else logits[0].grad, logits[1].grad]
    expected = torch.cat([grad.flatten() for grad in flat])
    torch.testing.assert_close(rounding.logit.grad, expected, rtol=1e-4, atol=1e-6)
    assert 0.05 < (expected == 0).float().mean() < 0.9


def test_rounding_gradient_moves_one_weight_only():
    weight = values(2, 3)
    rounding = Rounding([weight], [WeightQuantizer(weight, 4, "minmax")])
    rounding.weights[0][1, 2].backward()
    rounding.backward(0.01, None)
    assert rounding.logit.grad.nonzero().flatten().tolist() == [5]


def test_weight_that_nothing_depends_on_has_no_gradient():
    weights = [values(2, 3), values(2, 3, seed=1)]
    rounding = Rounding(weights, [WeightQuantizer(weight, 4, "minmax") for weight in weights])
    rounding.weights[0].sum().backward()
    rounding.backward(0.01, None)
    assert rounding.logit.grad[:6].any() and not rounding.logit.grad[6:].any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_coin_flips_lie_in_memory_as_what_they_are_for(layout):
    x = torch.empty(2, 3, 4, 5).to(memory_format=layout)
    assert coin_flips(x, 0.5, None).stride() == x.stride()
