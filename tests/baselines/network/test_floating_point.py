"""What multiplies outside of layers and of functions that can be led through modules is said."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention
from torchvision.ops import deform_conv2d

from baselines import quantize, summarize

from ..networks import randomized


@torch.library.custom_op("cat_tests::gram", mutates_args=())
def gram(x: torch.Tensor) -> torch.Tensor:
    return x @ x.mT @ x


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    return torch.softmax(q @ k.transpose(1, 2), -1) @ v


with pytest.warns(Warning) if torch.__version__ >= "2.9" else torch.no_grad():
    scripted = torch.jit.script(attend)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return torch.ops.aten.matmul(x, weight)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Calls(nn.Module):
    """A linear layer and what a function makes of its output."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function, self.weight = nn.Linear(8, 8), function, nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return self.function(self.layer(x), self.weight)


def flexible(x, weight):
    return flex_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def deformed(x, weight):
    return deform_conv2d(x[:, None], x.new_zeros(len(x), 2, 4, 8), weight[:1, :1, None, None])[:, 0]


FUNCTIONS = {
    "scripted": (lambda x, weight: scripted(x, x, x), "scripted bmm in 1"),
    "flexible": (flexible, "flex_attention in 1"),
    "deformable": (deformed, "torchvision::deform_conv2d in 1"),
    "custom-operator": (lambda x, weight: gram(x), "cat_tests::gram in 1"),
    "aten": (lambda x, weight: Own.apply(x, weight), "matmul in 1"),
    "compiled": (torch.compile(lambda x, weight: functional.linear(x, weight.exp()), backend="eager"), "linear in 1"),
    "embedding": (
        lambda x, weight: functional.embedding(torch.zeros_like(x[..., 0]).long(), weight) + x,
        "embedding in 1",
    ),
    "norm": (lambda x, weight: functional.layer_norm(x, (8,)).softmax(-1), None),
}


@pytest.mark.parametrize(("function", "said"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_products_that_no_module_computes_are_listed(function, said):
    model = randomized(nn.Sequential(nn.Linear(8, 8), Calls(function), nn.Flatten(), nn.Linear(32, 5)))
    x = torch.randn(64, 4, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network = quantize(model, x, method="rtn", w_bits=8, a_bits=8)
        assert (network(x) - model(x)).norm() < 0.1 * model(x).norm()
    assert summarize(network).floating_point.unquantized == (() if said is None else (said,))
