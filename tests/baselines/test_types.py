"""Networks of half precision, whole or in part: what they are quantized in, and the types that they come back in."""

import pytest
import torch
from torch import nn

from baselines import quantize
from baselines.network.reference_copy import reference_copy

from .networks import randomized


class Norm32(nn.LayerNorm):
    """Computes in float32 whatever comes in."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Head32(nn.Linear):
    def forward(self, x):
        return super().forward(x.float())


class CachedBias(nn.Module):
    """Keeps what it adds when training ends, in the type of then."""

    def __init__(self):
        super().__init__()
        self.qkv, self.bias = nn.Linear(8, 24), nn.Parameter(torch.zeros(4, 4))
        self.cached, self.masks = None, []

    def train(self, mode=True):
        super().train(mode)
        self.cached = None if mode else self.bias.detach() * 1
        self.masks = [] if mode else [torch.zeros_like(self.bias)]
        return self

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT + self.cached @ self.masks[0]).softmax(-1) @ v


class LazyBuffer(nn.Module):
    """Registers a buffer when it first sees an input."""

    def forward(self, x):
        if not hasattr(self, "offset"):
            self.register_buffer("offset", torch.ones(x.shape[-1], dtype=x.dtype))
        return x * self.offset


def network(middle, head=nn.Linear):
    return randomized(nn.Sequential(nn.Linear(6, 8), middle, nn.Linear(8, 8), nn.Flatten(), head(32, 5)))


def norm32(dtype):
    model = network(Norm32(8)).to(dtype)
    model[1].float()
    return model


def head32(dtype):
    model = network(nn.GELU(), Head32).to(dtype)
    model[4].float()
    return model


def first32(dtype):
    """The type of the first parameter is not that of most."""
    model = network(nn.GELU(), nn.Linear).to(dtype)
    model.insert(0, Norm32(6))
    return model


KINDS = {
    "all-half": lambda dtype: network(nn.GELU()).to(dtype),
    "norm-in-float32": norm32,
    "head-in-float32": head32,
    "first-in-float32": first32,
    "cached": lambda dtype: network(CachedBias()).to(dtype).train().eval(),
    "cached-in-float32": lambda dtype: network(CachedBias()).to(dtype),
    "lazy-buffer": lambda dtype: network(LazyBuffer()).to(dtype),
}


def inputs(count=64):
    return torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["rtn", "qdrop"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_quantized_network_has_the_types_of_the_network_and_computes_as_it(make, dtype, method):
    model, x = make(dtype), inputs().to(dtype)
    if make is KINDS["cached-in-float32"]:
        model[1].cached, model[1].masks = (torch.zeros(4, 4, dtype=dtype) for _ in range(2))
        model[1].masks = [model[1].masks]
    types = {name: value.dtype for name, value in model.state_dict().items()}
    quantized = quantize(model, x, method=method, w_bits=8, a_bits=8, iters=3)
    with torch.no_grad():
        expected, given = model(x), quantized(x)
    assert given.dtype == expected.dtype
    assert (given - expected).float().norm() < 0.05 * expected.float().norm()
    state = quantized.state_dict()
    assert all(state[name].dtype == kind for name, kind in types.items())
    assert types == {name: value.dtype for name, value in model.state_dict().items() if name in types}
    last = model[-1].weight.dtype
    assert state[f"{len(model) - 1}.weight_quantizer.scale"].dtype == last


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_everything_is_quantized_in_float32(dtype):
    model = network(CachedBias()).to(dtype).train().eval()
    twin = reference_copy(model)
    assert {p.dtype for p in twin.parameters()} == {twin[1].cached.dtype} == {twin[1].masks[0].dtype} == {torch.float32}
    assert model[1].cached.dtype == model[1].masks[0].dtype == dtype


def test_cast_to_half_precision_by_name_is_a_clear_error():
    class Names(nn.Module):
        def forward(self, x):
            return x.half()

    with pytest.raises(ValueError, match=r"does not take .*the network is quantized in float32: let its forward pass"):
        quantize(network(Names()).half(), inputs().half(), method="rtn")


def test_network_that_is_not_in_half_precision_keeps_its_types():
    model = network(CachedBias()).double()
    quantized = quantize(model, inputs().double(), method="rtn")
    assert {value.dtype for value in quantized.state_dict().values()} == {torch.float64}
