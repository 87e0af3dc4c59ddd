import pytest
import torch
from torch import nn

from baselines.network.batch_norm_folding import folded_copy
from baselines.network.trace import trace
from baselines.network.units import find_units

from ..networks import ReadByFunction, SmallResNet, images, randomized


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
