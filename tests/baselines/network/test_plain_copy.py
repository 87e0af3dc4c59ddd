import dataclasses
import threading
from types import MappingProxyType

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

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


def test_hooks_that_compute_a_weight_are_part_of_the_network():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 1)), nn.Flatten(), nn.Linear(256, 3)).eval()
    folded = folded_copy(model, images(2))
    with torch.no_grad():
        model[0].weight_orig.mul_(3)
        folded[0].weight_orig.mul_(3)
    assert torch.equal(folded(images(3)), model(images(3)))


@pytest.mark.parametrize(
    "make",
    [nn.utils.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)],
    ids=["weight-norm", "pruned"],
)
@pytest.mark.filterwarnings("ignore")
def test_network_that_cannot_be_copied_is_a_clear_error(make):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), make(nn.Conv2d(4, 4, 1)), nn.Flatten(), nn.Linear(256, 3))
    with pytest.raises(ValueError, match=r"make the computed weights of \['1'\] plain ones first"):
        folded_copy(model, images(2))
    model[1] = nn.Conv2d(4, 4, 1)
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
