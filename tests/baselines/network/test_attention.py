import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from baselines.network.attention import DotProductAttention, MultiheadAttention, Product
from baselines.quantization.quantizers import ActivationQuantizer

from ..networks import randomized


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 4 + [True], [False] * 5, [True, True] + [False] * 3])


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {}),
        ({"batch_first": False}, {"need_weights": False}),
        ({"bias": False}, {"average_attn_weights": False}),
        ({"add_bias_kv": True}, {"key_padding_mask": PADDING}),
        ({"add_zero_attn": True, "add_bias_kv": True}, {"attn_mask": MASK, "key_padding_mask": PADDING}),
        ({}, {"attn_mask": MASK, "is_causal": True}),
        ({}, {"attn_mask": tokens(5, 5)}),
        ({"batch_first": False}, {"attn_mask": tokens(12, 5, 5)}),
        ({}, {"key_padding_mask": torch.zeros(3, 5, dtype=torch.float64).masked_fill(PADDING, -torch.inf)}),
    ],
    ids=lambda value: "-".join(map(str, value)) or "plain",
)
@pytest.mark.parametrize("packed", [True, False])
def test_attention_in_parts_equals_torchs(options, call, packed):
    source = randomized(nn.MultiheadAttention(8, 4, **{"batch_first": True} | options)).double()
    x = tokens(3, 5, 8) if source.batch_first else tokens(5, 3, 8)
    for mine, theirs in zip(MultiheadAttention(source, packed)(x, x, x, **call), source(x, x, x, **call), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 4}], ids=["same", "other-sizes"])
def test_cross_attention_equals_torchs(sizes, batched):
    source = randomized(nn.MultiheadAttention(8, 2, batch_first=True, **sizes)).double()
    lead = (3,) if batched else ()
    query, key = tokens(*lead, 5, 8), tokens(*lead, 7, sizes.get("kdim", 8), seed=1)
    value = tokens(*lead, 7, sizes.get("vdim", 8), seed=2)
    mine, theirs = MultiheadAttention(source, False)(query, key, value), source(query, key, value)
    torch.testing.assert_close(mine[0], theirs[0])
    torch.testing.assert_close(mine[1], theirs[1])


def test_packed_projections_refuse_other_keys():
    attention = MultiheadAttention(nn.MultiheadAttention(8, 2), True)
    x = torch.zeros(5, 3, 8)
    with pytest.raises(ValueError, match="same tensor"):
        attention(x, x, x.clone())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"attn_mask": torch.ones(5, 7, dtype=torch.bool).tril(3)},
        {"attn_mask": tokens(1, 1, 5, 7)},
        {"is_causal": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_dot_product_attention_equals_torchs(options):
    query, key, value = tokens(2, 4, 5, 3), tokens(2, 4, 7, 3, seed=1), tokens(2, 4, 7, 6, seed=2)
    expected = functional.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(DotProductAttention()(query, key, value, **options), expected)


def test_grouped_queries_equal_torchs():
    query, key, value = tokens(2, 4, 5, 3), tokens(2, 2, 7, 3, seed=1), tokens(2, 2, 7, 3, seed=2)
    repeated = [t.repeat_interleave(2, 1) for t in (key, value)]
    expected = functional.scaled_dot_product_attention(query, *repeated)
    torch.testing.assert_close(DotProductAttention()(query, key, value, enable_gqa=True), expected)


def quantizer(bits, scale, zero_point):
    one = ActivationQuantizer(bits).double()
    one.scale.data.fill_(scale)
    one.zero_point.fill_(zero_point)
    return one


def test_both_factors_of_both_products_are_quantized():
    """Against the same steps written out."""
    attention = DotProductAttention()
    attention.scores.left_quantizer, attention.scores.right_quantizer = quantizer(3, 0.2, 4), quantizer(4, 0.3, 8)
    attention.mix.left_quantizer, attention.mix.right_quantizer = quantizer(2, 0.3, 0), quantizer(3, 0.5, 3)
    query, key, value = (tokens(2, 5, 4, seed=seed) for seed in range(3))

    def on_grid(x, bits, scale, zero_point):
        return scale * ((x / scale).round() + zero_point).clamp(0, 2**bits - 1).sub(zero_point)

    scores = on_grid(query / 2, 3, 0.2, 4) @ on_grid(key, 4, 0.3, 8).mT
    probabilities = scores.exp() / scores.exp().sum(-1, keepdim=True)
    expected = on_grid(probabilities, 2, 0.3, 0) @ on_grid(value, 3, 0.5, 3)
    torch.testing.assert_close(attention(query, key, value), expected)


def test_product_applies_any_function_to_its_factors():
    left, right = tokens(2, 3), tokens(4, 3)
    assert torch.equal(Product()(left, right, lambda a, b: torch.einsum("ij,kj->ik", a, b)), left @ right.T)


def test_source_is_not_changed():
    source = nn.MultiheadAttention(8, 2)
    before = copy.deepcopy(source.state_dict())
    twin = MultiheadAttention(source, True)
    assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items())
    assert twin.training and not MultiheadAttention(source.eval(), True).training
