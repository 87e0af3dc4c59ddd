import dataclasses
import threading
from types import MappingProxyType

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from baselines.network.folding import folded_copy
from baselines.network.trace import trace
from baselines.network.units import find_units

from ..networks import SmallResNet, images, randomized


def test_folding_keeps_the_outputs_and_removes_every_batch_norm():
    model = randomized(SmallResNet())
    folded = folded_copy(model, images(2))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(images(5)), model(images(5)), rtol=1e-4, atol=1e-5)


def test_batch_norm_whose_input_is_read_elsewhere_is_not_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.next = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = self.conv(x)
            return (self.bn(x) + self.next(x)).mean((2, 3))

    model = randomized(Shared())
    folded = folded_copy(model, images(2))
    assert isinstance(folded.bn, nn.BatchNorm2d)
    torch.testing.assert_close(folded(images(3)), model(images(3)))


class ReadByFunction(nn.Module):
    """The output of ``conv`` is also read by an addition, which is no module, so that no hook sees it."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv(self.bn0(self.stem(x)))
        return (self.bn(x) + x).mean((2, 3))


class PreActivation(nn.Module):
    """The shortcut is added in place to what the next batch norm reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        out = self.conv(self.bn1(x).relu())
        out += x
        return self.fc(self.bn2(out).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "norms_that_stay"),
    [(ReadByFunction, ["bn"]), (PreActivation, ["bn1", "bn2"])],
    ids=["function", "in-place"],
)
def test_batch_norm_that_cannot_be_folded_stays(network, norms_that_stay):
    model = randomized(network())
    folded = folded_copy(model, images(2))
    assert [name for name, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)] == norms_that_stay
    torch.testing.assert_close(folded(images(3)), model(images(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "folds"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6, affine=False)), True),
        (nn.Sequential(nn.Flatten(2), nn.Linear(64, 3), nn.BatchNorm1d(3), nn.Flatten()), False),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()), False),
    ],
    ids=["no-gain-and-shift", "linear-on-three-axes", "no-statistics"],
)
def test_unusual_batch_norms(network, folds):
    model = randomized(network)
    folded = folded_copy(model, images(4))
    assert any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules()) != folds
    torch.testing.assert_close(folded(images(4)), model(images(4)), rtol=1e-4, atol=1e-5)


def test_synchronised_batch_norm_is_folded():
    model = randomized(SmallResNet())
    folded = folded_copy(nn.SyncBatchNorm.convert_sync_batchnorm(model), images(2))
    assert not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in folded.modules())
    torch.testing.assert_close(folded(images(5)), model(images(5)), rtol=1e-4, atol=1e-5)


class Norms(nn.Module):
    """Convolutions with norms of one class behind them."""

    def __init__(self, norm):
        super().__init__()
        self.a, self.norm1, self.b, self.norm2 = nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 4, 3), norm(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.norm2(self.b(self.norm1(self.a(x)))).mean((2, 3)))


def test_activation_inside_of_a_batch_norm_stays_as_a_module_when_it_is_folded():
    layers = pytest.importorskip("timm.layers")
    model = randomized(Norms(layers.BatchNormAct2d))
    folded = folded_copy(model, images(2))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(images(5)), model(images(5)), rtol=1e-4, atol=1e-5)
    units = find_units(folded, trace(folded, images(2)), [], "layer")
    assert [isinstance(folded.get_submodule(unit.activation or ""), nn.ReLU) for unit in units] == [True, True, False]


class Doubling(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_batch_norm_that_does_more_stays_and_the_reason_is_said(caplog):
    model = randomized(Norms(Doubling))
    folded = folded_copy(model, images(2))
    assert isinstance(folded.norm1, Doubling) and isinstance(folded.norm2, Doubling)
    assert "norm1 (Doubling) stays: its class does more" in caplog.text
    torch.testing.assert_close(folded(images(5)), model(images(5)))


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
