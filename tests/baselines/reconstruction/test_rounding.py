import pytest
import torch

from baselines.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from baselines.reconstruction.rounding import Rounding


@pytest.fixture
def quantizer():
    module = ActivationQuantizer(2)
    module.scale.data.fill_(0.37)
    module.zero_point.fill_(1.0)
    module.scale.requires_grad_(True)
    return module


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
