"""What the state of a quantized network carries, and where it may be loaded."""

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from baselines import quantize

from .network.test_edges import AveragedHeads
from .networks import SmallResNet, images, randomized, same


def quantized(model, w_bits=4, a_bits=4, seed=0, **options):
    inputs = images(16, seed=seed)
    return quantize(randomized(model), inputs, method="rtn", w_bits=w_bits, a_bits=a_bits, batch_size=8, **options)


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        ({"a_bits": 2}, "activations have 2 bits where this one has 8"),
        ({"w_bits": 3}, "weights have 3 bits where this one has 8"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_state_of_other_bits_is_an_error_that_names_both(bits, said, strict):
    network = quantized(SmallResNet(), **{"w_bits": 8, "a_bits": 8} | bits)
    with pytest.raises(ValueError, match=said):
        quantized(SmallResNet(), w_bits=8, a_bits=8).load_state_dict(network.state_dict(), strict=strict)
    with pytest.raises(ValueError, match=said):  # as part of a larger model, too
        nn.Sequential(quantized(SmallResNet(), w_bits=8, a_bits=8)).load_state_dict(nn.Sequential(network).state_dict())


def test_state_without_bits_lacks_something():
    network = quantized(SmallResNet())
    state = {name: value for name, value in network.state_dict().items() if not name.endswith("_extra_state")}
    with pytest.raises(RuntimeError, match="Missing key"):
        network.load_state_dict(state)


@pytest.mark.parametrize("half", [False, True])
def test_shared_quantizers_save_as_safetensors(tmp_path, half):
    network, other = quantized(AveragedHeads()), quantized(AveragedHeads(), seed=5)
    if half:
        network, other = network.half(), other.half()
    assert network.h.input_quantizer is network.i.input_quantizer
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    state = load_file(tmp_path / "network.safetensors")
    assert state["h.input_quantizer.scale"].equal(state["i.input_quantizer.scale"])
    assert not same(network, other)
    other.load_state_dict(state)
    assert same(network, other) and other.h.input_quantizer is other.i.input_quantizer


def test_variables_of_a_state_are_the_networks_own():
    network = quantized(AveragedHeads())
    state = network.state_dict(keep_vars=True)
    assert state["i.input_quantizer.scale"] is network.h.input_quantizer.scale


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.fc = (nn.Linear(*sizes) for sizes in ((192, 8), (8, 8), (8, 8), (8, 3)))
        if tied:
            self.two.weight = self.one.weight

    def forward(self, x):
        return self.fc(self.two(self.one(self.stem(x.flatten(1)).relu()).relu()))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_said(tied, caplog):
    quantized(Tied(tied))
    said = "tied weights are no longer tied in the quantized network"
    assert (said in caplog.text) == ("[['one.weight', 'two.weight']]" in caplog.text) == tied
