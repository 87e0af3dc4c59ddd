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
