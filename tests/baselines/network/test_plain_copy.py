import copy
import dataclasses
import threading
from types import MappingProxyType

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from baselines import quantize, summarize
from baselines.network.batch_norm_folding import folded_copy

from ..networks import ReadByFunction, SmallResNet, images, randomized


@dataclasses.dataclass
class Scores:
    logits: torch.Tensor


class Output(nn.Module):
    """Gives what a function makes of the scores of a network in which a norm must not be folded."""

    def __init__(self, form):
        super().__init__()
        self.body, self.form = ReadByFunction(), form

    def forward(self, x):
        return self.form(self.body(x))


class Unknown:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize(
    "form",
    [Scores, lambda x: {"logits": x}, lambda x: MappingProxyType({"logits": x}), lambda x: [(x,)]],
    ids=["dataclass", "dict", "mapping", "nested"],
)
def test_outputs_of_any_known_form_are_compared(form):
    folded = folded_copy(randomized(Output(form)), images(2))
    assert isinstance(folded.body.bn, nn.BatchNorm2d) and isinstance(folded.body.bn0, nn.Identity)


def test_outputs_without_a_known_tensor_are_a_clear_error():
    with pytest.raises(ValueError, match="Output gives a Unknown, in which no tensor was found"):
        folded_copy(randomized(Output(Unknown)), images(2))


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda *args: seen.append(1)),
    "forward-pre": lambda module, seen: module.register_forward_pre_hook(lambda *args: seen.append(1)),
    "backward": lambda module, seen: module.register_full_backward_hook(lambda *args: seen.append(1)),
    "backward-pre": lambda module, seen: module.register_full_backward_pre_hook(lambda *args: seen.append(1)),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_are_not_taken_over_and_that_is_said(register, caplog):
    model, seen = randomized(SmallResNet()), []
    register(model.layer1[0], seen)
    folded = folded_copy(model, images(2))
    folded(images(2).requires_grad_()).sum().backward()
    assert not seen
    assert "hooks are not taken over" in caplog.text and "['layer1.0']" in caplog.text
    model(images(2).requires_grad_()).sum().backward()
    assert seen


class Symmetric(nn.Module):
    """A parametrization of a user's own."""

    def forward(self, weight):
        return (weight + weight.flip(0)) / 2


COMPUTED = {
    "weight-norm": nn.utils.weight_norm,
    "spectral-norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned-twice": lambda layer: prune.random_unstructured(prune.l1_unstructured(layer, "weight", 2), "weight", 2),
    "parametrized-weight-norm": nn.utils.parametrizations.weight_norm,
    "parametrized-spectral-norm": nn.utils.parametrizations.spectral_norm,
    "parametrized-by-the-user": lambda layer: nn.utils.parametrize.register_parametrization(
        layer, "weight", Symmetric()
    ),
}


@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.filterwarnings("ignore")
def test_computed_weights_become_plain_ones_and_the_users_stay(make, caplog):
    layer = make(nn.Conv2d(4, 4, 1))
    layer(torch.zeros(1, 4, 1, 1))  # keeps a weight that was computed with gradients
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Flatten(), nn.Linear(256, 3)).eval()
    kinds, state, expected = [type(m) for m in model], copy.deepcopy(model.state_dict()), model(images(3))
    folded = folded_copy(model, images(2))
    assert type(folded[1]) is nn.Conv2d
    assert sorted(name for name, _ in folded[1].named_parameters()) == ["bias", "weight"]
    assert not folded[1]._forward_pre_hooks and not dict(folded[1].named_buffers())
    torch.testing.assert_close(folded(images(3)), expected)
    network = quantize(model, images(8), method="rtn", w_bits=3, a_bits=32)
    assert all(len(channel.unique()) <= 8 for channel in network[1].weight)
    assert summarize(network).floating_point.unquantized == ()
    assert "hooks are not taken over" not in caplog.text
    assert [type(m) for m in model] == kinds and torch.equal(model(images(3)), expected)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_network_that_cannot_be_copied_is_a_clear_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 3))
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"Sequential cannot be copied .* remove what copy.deepcopy does not take"):
        folded_copy(model, images(2))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 1, 8, 8), r"shape \(2, 1, 8, 8\) and type torch.float32: RuntimeError: .*channels"),
        (torch.zeros(2, 3, 8, 8).byte(), r"type torch.uint8: RuntimeError"),
    ],
    ids=["channels", "type"],
)
def test_inputs_that_the_network_does_not_take_are_a_clear_error(inputs, message):
    with pytest.raises(ValueError, match=f"SmallResNet does not take calibration inputs of .*{message}"):
        folded_copy(randomized(SmallResNet()), inputs)
