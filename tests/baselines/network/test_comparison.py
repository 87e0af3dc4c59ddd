"""The copy that is quantized is still the network: aliases, kept values, random outputs, infinite logits."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from baselines import quantize
from baselines.network.batch_norm_folding import folded_copy
from baselines.network.comparison import check_same_network, same_outputs
from baselines.network.plain_copy import plain_copy

from ..networks import ReadByFunction, SmallResNet, images, randomized


class Shortcut(nn.Module):
    """The shortcut reads what the activation has written into."""

    def __init__(self, activation):
        super().__init__()
        self.activation, self.conv = activation, nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(self.activation(x)) + x


class ShortcutOfView(Shortcut):
    """The alias is a view that was taken before."""

    def forward(self, x):
        view = x.flatten(2)
        return self.conv(self.activation(x)) + view.view_as(x)


class ShortcutInList(Shortcut):
    """The alias is kept in a list while a module further down writes into it."""

    def forward(self, x):
        kept = [x]
        return self.conv(nn.Sequential(nn.Identity(), self.activation)(x)) + kept[0]


def preactivated(block, activation):
    blocks = [block(activation()) for _ in range(2)]
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1), *blocks]
    return randomized(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))


class WritesIntoWhatWasRead(Shortcut):
    """By a function, behind the layer that read it: nothing that could be trained."""

    def forward(self, x):
        y = self.conv(x)
        self.activation(x)
        return y.sigmoid_() + x


ACTIVATIONS = {
    "relu": lambda: nn.ReLU(inplace=True),
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.3, inplace=True),
}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("block", [Shortcut, ShortcutOfView, ShortcutInList])
def test_activation_works_in_place_only_where_others_read_what_it_wrote(block, activation):
    model = preactivated(block, activation)
    plain = plain_copy(model, images(2))
    torch.testing.assert_close(plain(images(5)), model(images(5)))
    assert [plain[2].inplace, plain[4].activation.inplace, plain[5].activation.inplace] == [False, True, True]
    assert all(m.inplace for m in (model[2], model[4].activation, model[5].activation))


@pytest.mark.parametrize("method", ["rtn", "adaround", "qdrop", "pd_quant"])
@pytest.mark.parametrize("block", [Shortcut, ShortcutOfView])
def test_network_with_aliases_is_quantized_as_well_as_the_same_without(block, method):
    """Written without aliases, the shortcut adds what the activation gave."""

    class WithoutAlias(Shortcut):
        def forward(self, x):
            x = self.activation(x)
            return self.conv(x) + x

    x, errors = images(64), []
    for kind in (block, WithoutAlias):
        model = preactivated(kind, ACTIVATIONS["hardswish"])
        network = quantize(model, x, method=method, w_bits=8, a_bits=8, iters=20)
        with torch.no_grad():
            expected = model(x)
            errors.append(((network(x) - expected).norm() / (expected - expected.mean(0)).norm()).item())
    assert 0 < errors[0] < 2 * errors[1] < 0.3


@pytest.mark.parametrize("method", ["adaround", "brecq", "qdrop"])
def test_unit_that_writes_into_what_its_layer_has_read_is_reconstructed(method):
    class Block(nn.Sequential):
        pass

    def network(*blocks):
        parts = [nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
        return randomized(nn.Sequential(*parts))

    activation = nn.LeakyReLU(0.3, inplace=True)
    inner = [WritesIntoWhatWasRead(activation), WritesIntoWhatWasRead(activation)]
    model, x = network(nn.Sequential(Block(*inner))), images(64)
    results = [
        quantize(model, x, method=how, w_bits=4, a_bits=4, iters=iters) for how, iters in ((method, 20), ("rtn", 0))
    ]
    with torch.no_grad():
        learned, nearest = ((network(x) - model(x)).norm() for network in results)
    assert learned < nearest


class FlatShortcut(nn.Module):
    """No module around layer, activation and shortcut but the network itself."""

    def __init__(self):
        super().__init__()
        self.stem, self.activation, self.conv = nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head((self.conv(self.activation(x)) + x).mean((2, 3)))


def test_layer_before_an_activation_in_place_is_reconstructed_with_predictions():
    model, x = randomized(FlatShortcut()), images(64)
    network = quantize(model, x, method="pd_quant", w_bits=8, a_bits=8, iters=3)
    with torch.no_grad():
        assert (network(x) - model(x)).norm() < 0.1 * model(x).norm()


class Counting(nn.Module):
    """Gives something else after its first passes."""

    passes = 0

    def forward(self, x):
        self.passes += 1
        return x * (1 + (self.passes > self.patience))


def test_copy_that_parts_from_the_network_is_an_error_that_names_the_module():
    reference = randomized(SmallResNet())
    other = plain_copy(reference, images(2))
    check_same_network(reference, other, images(4))
    other.layer1[1].bn2.bias.data += 0.1
    with pytest.raises(
        ValueError, match=r"copy of SmallResNet .* the first module where they part is layer1\.1\.bn2 \(BatchNorm2d\)"
    ):
        check_same_network(reference, other, images(4))


class Patient(Counting):
    def __init__(self, patience):
        super().__init__()
        self.patience = patience


def test_network_that_changes_from_pass_to_pass_is_named():
    parts = [nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 3)]
    errors = []
    for patience in range(12):
        model = randomized(nn.Sequential(parts[0], Patient(patience), *parts[1:]))
        try:
            quantize(model, images(8), method="rtn", w_bits=8, a_bits=8)
        except ValueError as error:
            errors.append(str(error))
    assert errors and all("first module where they part is 1 (Patient)" in error for error in errors)


def test_folding_that_changes_the_network_is_found_on_further_images():
    """On the example the norm could be folded; on other images a function reads what it was folded into."""

    class Sometimes(ReadByFunction):
        def forward(self, x):
            x = self.conv(self.bn0(self.stem(x)))
            return (self.bn(x) + x * (len(x) > 2)).mean((2, 3))

    model = randomized(Sometimes())
    with pytest.raises(ValueError, match=r"copy of Sometimes .* gives other outputs than the network itself"):
        folded_copy(model, images(2), images(5))


class LeftOn(nn.Module):
    """Dropout that does not ask whether there is training."""

    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.norm, self.head = how, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        if self.how == "dropout":
            x = functional.dropout(x)
        elif self.how == "torch":
            x = torch.dropout(x, 0.5, True)
        elif self.how == "attention":
            x = x.flatten(2).mT
            x = functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5).mT.unflatten(2, (6, 6))
        elif self.how == "noise":
            x = x + torch.rand_like(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("dropout", "by dropout in LeftOn"),
        ("torch", "by dropout in LeftOn"),
        ("attention", "by scaled_dot_product_attention in LeftOn"),
        ("noise", "by rand_like in LeftOn"),
        ("nothing", None),
    ],
)
def test_random_outputs_are_recognised_and_nothing_else_is_said(how, said, caplog):
    model = randomized(LeftOn(how))
    before = torch.get_rng_state()
    network = quantize(model, images(16), method="rtn", w_bits=8, a_bits=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(network.norm, nn.Identity)
    assert [said in record.message for record in caplog.records] == ([] if said is None else [True])
    again = quantize(model, images(16), method="rtn", w_bits=8, a_bits=8)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


class Masked(nn.Module):
    """Classes that are not to be predicted have minus infinity."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        scores = self.head(self.norm(self.conv(x)).relu().mean((2, 3)))
        return scores.index_fill(1, torch.tensor([3, 4]), -torch.inf)


@pytest.mark.parametrize("method", ["rtn", "brecq", "pd_quant"])
def test_infinite_logits_are_the_same_where_both_have_them(method, caplog):
    weighting = "fisher" if method == "brecq" else None
    model = randomized(Masked())
    network = quantize(model, images(64), method=method, w_bits=8, a_bits=8, iters=5, error_weighting=weighting)
    assert isinstance(network.norm, nn.Identity) and caplog.text == ""
    with torch.no_grad():
        given, expected = network(images(64)), model(images(64))
    assert torch.equal(given[:, 3:], expected[:, 3:])
    assert (given - expected)[:, :3].norm() < 0.1 * expected[:, :3].norm()


@pytest.mark.parametrize("change", [3.0, torch.inf, torch.nan])
def test_other_infinite_values_are_a_difference(change):
    class Given(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return torch.cat([x.mean((1, 2, 3)), torch.tensor([-torch.inf, self.value])])

    assert same_outputs(Given(-torch.inf), Given(-torch.inf), images(2))
    assert not same_outputs(Given(-torch.inf), Given(change), images(2))


class Sensitive(nn.Module):
    """Makes a difference of a thousandth of what float32 rounds."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return torch.sin(2e4 * self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


def test_rounding_that_a_network_makes_much_of_is_no_difference():
    torch.manual_seed(0)
    model, images = Sensitive().eval(), torch.randn(8, 3, 12, 12)
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    rounded, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        rounded.conv.weight.mul_(1 + 2e-7 * torch.randn_like(rounded.conv.weight))
        other.conv.weight.mul_(1 + 1e-4 * torch.randn_like(other.conv.weight))
    assert not same_outputs(model, rounded, images)
    check_same_network(model, rounded, images)
    with pytest.raises(ValueError, match="the first module where they part is"):
        check_same_network(model, other, images)
