"""Attention from parts that can be quantized one by one: linear layers, and products of two activations."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Product(nn.Module):
    """A product of two activations, such as queries and keys, or attention probabilities and values; or of an
    activation and a weight that is no layer's.

    Attributes:
        left_quantizer, right_quantizer: quantize the two factors; `None` where they stay in floating point.
        weight_at: which factor is a parameter or buffer of the network, 0 or 1; `None` where both are activations.
    """

    left_quantizer: nn.Module | None
    right_quantizer: nn.Module | None

    def __init__(self, weight_at: int | None = None) -> None:
        super().__init__()
        self.left_quantizer = self.right_quantizer = None
        self.weight_at = weight_at

    def forward(
        self, left: Tensor, right: Tensor, function: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    ) -> Tensor:
        """`function(left, right)`."""
        left = left if self.left_quantizer is None else self.left_quantizer(left)
        right = right if self.right_quantizer is None else self.right_quantizer(right)
        return function(left, right)


class DotProductAttention(nn.Module):
    """`torch.nn.functional.scaled_dot_product_attention` in steps: `mix(softmax(scores(q, k)), v)`.

    Fused kernels never hold the probabilities, so what is quantized there has to be computed one by one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.mix = Product(), Product()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As torch's function: query `(..., L, E)`, key `(..., S, E)`, value `(..., S, F)` to `(..., L, F)`;
        in a mask of booleans, true elements take part."""
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        if is_causal:
            allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
            attn_mask = allowed if attn_mask is None else _additive(attn_mask, query) + _additive(allowed, query)
        added = None if attn_mask is None else _additive(attn_mask, query)
        if added is None:
            probabilities = self.probabilities(query, key, None, scale)
        else:  # a query that no key is allowed for gets nothing, as in torch's function; its gradients are finite, too
            blocked = added.isneginf().all(-1, keepdim=True)
            probabilities = self.probabilities(query, key, added.masked_fill(blocked, 0.0), scale)
            probabilities = probabilities.masked_fill(blocked, 0.0)
        return self.mix(functional.dropout(probabilities, dropout_p), value)

    def probabilities(self, query: Tensor, key: Tensor, added: Tensor | None, scale: float | None = None) -> Tensor:
        """Attention probabilities `(..., L, S)`; `added` goes onto the scores."""
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = self.scores(query * scale, key.transpose(-2, -1))
        return (scores if added is None else scores + added).softmax(-1)


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask to add to scores; of booleans, false ones become minus infinity."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, -torch.inf)


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with its projections as linear layers and its products as modules.

    torch's class keeps three projections in one bare parameter and hands everything to one function (in eval mode
    to a fused kernel), where nothing can be quantized.

    Args:
        source: what to stand in for. Its parameters are shared, not copied.
        packed: queries, keys and values are always projections of the same tensor, which one layer can give.
    """

    in_proj_bias = None  # with these, torch's transformer layers leave their fused kernels alone
    _qkv_same_embed_dim = False

    def __init__(self, source: nn.MultiheadAttention, packed: bool) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout = source.embed_dim, source.num_heads, source.dropout
        self.kdim, self.vdim, self.head_dim = source.kdim, source.vdim, source.head_dim
        self.batch_first, self.add_zero_attn = source.batch_first, source.add_zero_attn
        self.bias_k, self.bias_v = source.bias_k, source.bias_v
        if source._qkv_same_embed_dim:
            weights = source.in_proj_weight.chunk(3)
        else:
            weights, packed = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight), False
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        if packed:
            self.in_proj = _linear(source.in_proj_weight, source.in_proj_bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.attention = DotProductAttention()
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        self.train(source.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's class; in masks of booleans, true elements do not take part.

        Raises:
            ValueError: other keys or values than queries, where the projections are packed; `is_causal` without
                a mask.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask, which is None; give that mask, too")
        batched = query.dim() == 3
        q, k, v = (self._batch_first(t, batched) for t in self._projections(query, key, value))
        if self.bias_k is not None:
            k, v = (torch.cat([t, b.expand(len(t), 1, -1)], 1) for t, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(len(t), 1, t.shape[2])], 1) for t in (k, v))
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        added = self._added(attn_mask, key_padding_mask, q, k.shape[2])
        probabilities = self.attention.probabilities(q, k, added)
        probabilities = functional.dropout(probabilities, self.dropout, self.training)
        mixed = self.attention.mix(probabilities, v).transpose(1, 2).flatten(2)
        output = self.out_proj(mixed if self.batch_first or not batched else mixed.transpose(0, 1))
        if not batched:
            output, probabilities = output.squeeze(0), probabilities.squeeze(0)
        if not need_weights:
            return output, None
        return output, probabilities.mean(-3) if average_attn_weights else probabilities

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if "in_proj" not in self._modules:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is not key or query is not value:
            raise ValueError(
                "this attention was converted for queries, keys and values that are the same tensor, and now they are "
                "not; its calls depend on data: convert it with an example that shows it"
            )
        return self.in_proj(query).chunk(3, -1)

    def _batch_first(self, projected: Tensor, batched: bool) -> Tensor:
        if not batched:
            return projected.unsqueeze(0)
        return projected if self.batch_first else projected.transpose(0, 1)

    def _added(self, mask: Tensor | None, padding: Tensor | None, query: Tensor, keys: int) -> Tensor | None:
        """Both masks as one tensor to add to the scores (batch, heads, queries, keys)."""
        added = None
        if mask is not None:
            added = mask if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))
            added = self._padded(added, query, keys)
        if padding is not None:
            padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
            padding = self._padded(padding, query, keys)[:, None, None]
            added = padding if added is None else added + padding
        return added

    @staticmethod
    def _padded(mask: Tensor, query: Tensor, keys: int) -> Tensor:
        mask = _additive(~mask, query) if mask.dtype == torch.bool else mask
        return functional.pad(mask, (0, keys - mask.shape[-1]))  # the keys that were appended always take part


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer that holds these very tensors, or parts of them."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return layer
