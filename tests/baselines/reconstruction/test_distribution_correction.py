import logging

import pytest
import torch
from torch import nn

from baselines.network.plain_copy import plain_copy
from baselines.recipes import Correction
from baselines.reconstruction.cache import Cached, CachePlan
from baselines.reconstruction.distribution_correction import Corrector, distance_to_statistics

from ..networks import SmallResNet, images, randomized

CPU = torch.device("cpu")

PLAN = CachePlan(CPU, None, CPU)


def distance(module, inputs, norms):
    """Naive: channel by channel."""
    reached = {}
    handles = [
        norm.register_forward_hook(lambda norm, args, _: reached.__setitem__(norm, args[0].detach())) for norm in norms
    ]
    module(inputs)
    for handle in handles:
        handle.remove()
    total = 0.0
    for norm, value in reached.items():
        for number, (mean, var) in enumerate(zip(norm.running_mean, norm.running_var, strict=True)):
            channel = value[:, number].reshape(-1)
            total += (channel.mean() - mean) ** 2 + ((channel.var() + 1e-6).sqrt() - (var + 1e-6).sqrt()) ** 2
    return float(total)


@pytest.mark.parametrize("unit", ["conv1", "layer1.1"])
def test_corrected_inputs_bring_the_statistics_nearer_and_leave_the_network_as_it_was(unit):
    network = plain_copy(randomized(SmallResNet()), images(2))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    corrector = Corrector(network, images(2), Correction(closeness=1.0, steps=10, lr=0.05))
    if unit == "conv1":
        module, norms, inputs = nn.Sequential(network.conv1, network.bn1), [network.bn1], images(6)
    else:
        module = network.get_submodule(unit)
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        inputs = torch.randn(6, 8, 8, 8, generator=torch.Generator().manual_seed(2)).relu()
    kept = inputs.clone()
    corrected = corrector.correct(unit, Cached(inputs, PLAN), 4).tensor
    assert distance(module, corrected, norms) < 0.8 * distance(module, inputs, norms)
    assert torch.equal(inputs, kept) and not corrected.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())


def test_the_closer_the_less_is_changed():
    network = plain_copy(randomized(SmallResNet()), images(2))
    moved = [
        Corrector(network, images(2), Correction(closeness=closeness, steps=20, lr=0.05))
        .correct("conv1", Cached(images(6), PLAN), 6)
        .tensor.sub(images(6))
        .norm()
        for closeness in (0.1, 10.0, 1000.0)
    ]
    assert moved[0] > 1.5 * moved[1] > 3 * moved[2]


def test_distance_to_statistics_is_the_naive_one():
    norm = randomized(SmallResNet()).bn1
    value = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = distance(norm, value, [norm])
    assert distance_to_statistics(norm, value).item() == pytest.approx(expected, rel=1e-4)
    assert distance_to_statistics(norm, value[:1, :, 0, 0]).item() == 0  # nothing to average over


@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 3), (5, 8, 3, 2)])
def test_gradient_of_the_distance_is_that_of_its_definition(shape):
    norm = randomized(SmallResNet()).bn1.double()
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    for layout in (value, value.transpose(0, -1).contiguous().transpose(0, -1)):
        axes = [axis for axis in range(len(shape)) if axis != 1]
        deviation, target = ((v + 1e-6).sqrt() for v in (value.var(axes), norm.running_var))
        naive = (value.mean(axes) - norm.running_mean).square().sum() + (deviation - target).square().sum()
        (expected,) = torch.autograd.grad(3 * naive, value)
        (found,) = torch.autograd.grad(3 * distance_to_statistics(norm, layout), value)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adds_in_float32(dtype):
    norm = nn.BatchNorm2d(4).eval()
    value = 30 + torch.randn(32, 4, 56, 56, generator=torch.Generator().manual_seed(0))
    halves, exact = value.to(dtype).requires_grad_(), value.to(dtype).float().requires_grad_()
    found, expected = distance_to_statistics(norm, halves), distance_to_statistics(norm, exact)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    (found,), (expected,) = torch.autograd.grad(1e4 * found, halves), torch.autograd.grad(1e4 * expected, exact)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=1e-4 * expected.abs().max().item())


def test_inputs_go_down_the_sum_of_both_losses():
    """Against autograd on the loss as it is written in the paper."""
    module, start = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), images(6, size=4)
    network = randomized(nn.Sequential(module, nn.ReLU()))
    correction = Correction(closeness=7.0, steps=5, lr=0.03)
    found = Corrector(network, start, correction).correct("0", Cached(start, PLAN), 6).tensor
    x, norm = start.clone().requires_grad_(), module[1]
    optimizer = torch.optim.Adam([x], lr=correction.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=correction.steps)
    for _ in range(correction.steps):
        optimizer.zero_grad()
        value = module[0](x)
        deviation, target = ((v + 1e-6).sqrt() for v in (value.var((0, 2, 3)), norm.running_var))
        loss = (value.mean((0, 2, 3)) - norm.running_mean).square().sum() + (deviation - target).square().sum()
        (loss + correction.closeness * (x - start).square().sum(1).mean()).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(found, x.detach(), rtol=1e-4, atol=1e-5)


def test_a_norm_that_sees_nothing_of_the_input_leaves_it():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return x.mean((2, 3)) + 0 * self.norm(torch.ones(len(x), 3))

    network = nn.Sequential(Constant(), nn.Linear(3, 2)).eval()
    inputs = images(4)
    corrected = Corrector(network, inputs, Correction(closeness=1.0, steps=3, lr=0.1)).correct(
        "0", Cached(inputs, PLAN), 4
    )
    torch.testing.assert_close(corrected.tensor, inputs, rtol=0, atol=0)


def test_without_batch_norm_inputs_stay_and_it_is_logged(caplog):
    network = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    with caplog.at_level(logging.INFO, logger="baselines"):
        corrector = Corrector(network, images(2), Correction(closeness=1.0, steps=3, lr=0.1))
    assert "no batch norm" in caplog.text
    inputs = Cached(images(4), PLAN)
    assert corrector.correct("0", inputs, 4) is inputs


@pytest.mark.parametrize(
    ("count", "sizes"), [(1024, [64] * 16), (65, [32, 33]), (130, [43, 43, 44]), (64, [64]), (10, [10])]
)
def test_statistics_are_those_of_batches_of_even_size(count, sizes, monkeypatch):
    seen, real = [], Corrector._corrected

    def watch(self, unit, inside, behind, start):
        seen.append(len(start))
        return real(self, unit, inside, behind, start)

    monkeypatch.setattr(Corrector, "_corrected", watch)
    network = plain_copy(randomized(SmallResNet()), images(2))
    inputs = images(count, size=4)
    corrector = Corrector(network, images(2), Correction(closeness=1e9, steps=1, lr=1e-9))
    corrected = corrector.correct("conv1", Cached(inputs, PLAN), 64).tensor
    assert seen == sizes
    torch.testing.assert_close(corrected, inputs)  # each image once, in its place
