"""Scales and zero points from data: min-max, or the range with the smallest p-norm rounding error.

All candidates of all channels are scored together, in two passes: a coarse grid over how far the lower and the
upper end are pulled in, then a fine grid around each channel's best. Large activation tensors are first reduced to
a histogram, so the search costs the same whatever their size.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORM = 2.4
"""Exponent of the error, as in the QDrop authors' observer (large errors count more than in the MSE)."""

_COARSE, _FINE = 12, 7
_HISTOGRAM_BINS = 2048
_CHUNK_ELEMENTS = 1 << 22


def weight_range(weight: Tensor, bits: int, method: str = "mse") -> tuple[Tensor, Tensor]:
    """Range of each output channel of ``weight (channels, ...)``: ``scale``, ``zero_point``, both ``(channels,)``."""
    rows = weight.detach().flatten(1)
    return _search(rows, torch.ones_like(rows[:1]), _ends(rows), bits, method)


def activation_range(values: Tensor, bits: int, method: str = "mse") -> tuple[Tensor, Tensor]:
    """One range for a whole activation tensor of any shape: 0-dim ``scale`` and ``zero_point``."""
    flat = values.detach().float().flatten()
    low, high = _ends(flat.unsqueeze(0))
    rows, counts = flat.unsqueeze(0), torch.ones_like(flat.unsqueeze(0))
    if flat.numel() > _HISTOGRAM_BINS and high > low:
        counts = torch.histc(flat, _HISTOGRAM_BINS, low.item(), high.item()).unsqueeze(0)
        centres = torch.arange(_HISTOGRAM_BINS, device=flat.device, dtype=flat.dtype) + 0.5
        rows = (low + centres * (high - low) / _HISTOGRAM_BINS).unsqueeze(0)
    scale, zero_point = _search(rows, counts, (low, high), bits, method)
    return scale.squeeze(0), zero_point.squeeze(0)


def _ends(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each row, widened so that zero is inside and stays exactly representable."""
    low, high = rows.aminmax(dim=1)
    return low.float().clamp(max=0), high.float().clamp(min=0)


def _affine(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    scale = (high - low) / levels
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
    return scale, (-low / scale).round().clamp(0, levels)


def _search(rows: Tensor, counts: Tensor, ends: tuple[Tensor, Tensor], bits: int, method: str) -> tuple[Tensor, Tensor]:
    levels = 2**bits - 1
    low, high = ends
    if method == "minmax":
        return _affine(low, high, levels)
    rows = rows.float()
    one_sided = bool((low == 0).all() or (high == 0).all())
    coarse = torch.linspace(1 / _COARSE, 1, _COARSE * 4 if one_sided else _COARSE, device=rows.device)
    keep_low, keep_high = _best(rows, counts, low, high, *_grid(coarse, coarse, one_sided), levels)
    step = torch.linspace(-1, 1, _FINE, device=rows.device) * (coarse[1] - coarse[0])
    offsets = _grid(step, step, one_sided)
    shrink = [(keep + offset).clamp(1e-3, 1) for keep, offset in zip((keep_low, keep_high), offsets, strict=True)]
    keep_low, keep_high = _best(rows, counts, low, high, *shrink, levels)
    return _affine(low * keep_low, high * keep_high, levels)


def _grid(a: Tensor, b: Tensor, one_sided: bool) -> tuple[Tensor, Tensor]:
    """Candidates as two ``(n, 1)`` columns: all pairs, or the diagonal where one end is zero anyway."""
    first, second = (a, b) if one_sided else torch.cartesian_prod(a, b).unbind(1)
    return first.unsqueeze(1), second.unsqueeze(1)


def _best(
    rows: Tensor, counts: Tensor, low: Tensor, high: Tensor, keep_low: Tensor, keep_high: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """The fractions ``(channels,)`` of ``low`` and ``high`` with the least error, among ``(candidates, channels)``."""
    scale, zero_point = _affine(low * keep_low, high * keep_high, levels)
    chunk = max(1, _CHUNK_ELEMENTS // rows.numel())
    errors = [
        _error(rows, counts, s.unsqueeze(2), z.unsqueeze(2), levels)
        for s, z in zip(scale.split(chunk), zero_point.split(chunk), strict=True)
    ]
    best = torch.cat(errors).argmin(0, keepdim=True)
    return tuple(keep.expand_as(scale).gather(0, best).squeeze(0) for keep in (keep_low, keep_high))


def _error(rows: Tensor, counts: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """Summed error ``(m, channels)`` of ``rows (channels, n)`` for candidates ``(m, channels, 1)``."""
    error = (rows / scale).round_().add_(zero_point).clamp_(0, levels).sub_(zero_point).mul_(scale)
    return error.sub_(rows).abs_().pow_(NORM).mul_(counts).sum(2)
