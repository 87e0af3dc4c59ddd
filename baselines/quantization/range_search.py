"""Scales and zero points from data: min-max, or the range with the smallest p-norm rounding error.

Candidates are those of the QDrop authors' observer: a hundred widths, and for each of them every zero point. All
channels are scored together, in two passes: every fourth width and, from 5 bits on, some of the zero points; then all
that lie around each channel's best. Most candidates are out by what they lose of the largest values alone. Large
activation tensors are first reduced to a histogram, so the search costs the same whatever their size.
"""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

NORM = 2.4
"""Exponent of the error, as in the QDrop authors' observer (large errors count more than in the MSE)."""

_WIDTHS = 100
"""Candidates are multiples of this fraction of the distance from the lowest to the highest value (as the authors')."""

_STRIDE = 4
_COARSE_ZERO_POINTS = 16
_HISTOGRAM_BINS = 2048
_CHUNK_ELEMENTS = 1 << 22
_SHARE_OF_FAR, _FEWEST_FAR = 16, 8
"""Of the values of a channel, the share, and the number, of the largest ones that candidates are first judged by."""
_ROUNDING = 1 + 1e-5
"""What a sum of errors in another order may differ by."""


def weight_range(weight: Tensor, bits: int, method: str = "mse") -> tuple[Tensor, Tensor]:
    """Range of each output channel of `weight` (channels, ...): `scale`, `zero_point`, both (channels,)."""
    rows = weight.detach().flatten(1)
    return _search(rows, None, _ends(rows), bits, method)


def activation_range(values: Tensor, bits: int, method: str = "mse") -> tuple[Tensor, Tensor]:
    """One range for a whole activation tensor of any shape: 0-dim `scale` and `zero_point`."""
    flat = values.detach().float().flatten()
    low, high = _ends(flat.unsqueeze(0))
    rows, counts = flat.unsqueeze(0), None
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


def _search(
    rows: Tensor, counts: Tensor | None, ends: tuple[Tensor, Tensor], bits: int, method: str
) -> tuple[Tensor, Tensor]:
    """Range of each row of `rows` (channels, n); a value counts as often as `counts` (1, n) says (None: once)."""
    levels = 2**bits - 1
    low, high = ends
    if method == "minmax":
        return _affine(low, high, levels)
    rows, unit = rows.float(), (high - low) / (_WIDTHS * levels)
    empty = unit <= torch.finfo(unit.dtype).tiny
    unit = torch.where(empty, torch.ones_like(unit), unit)
    lowest = levels if bool((high == 0).all() and (low < 0).any()) else 0
    highest = 0 if bool((low == 0).all()) else levels
    coarse = min(highest - lowest + 1, _COARSE_ZERO_POINTS)
    zero_points = torch.linspace(lowest, highest, coarse, device="cpu").round().tolist()
    candidates = _pairs(range(_STRIDE, _WIDTHS + 1, _STRIDE), zero_points, rows)
    width, zero_point = _best(rows, counts, unit, *candidates, levels)
    gap = int(max((b - a for a, b in itertools.pairwise(zero_points)), default=0))
    nearby = _pairs(range(1 - _STRIDE, _STRIDE), range(-gap, gap + 1), rows)
    candidates = (width + nearby[0]).clamp(1, _WIDTHS), (zero_point + nearby[1]).clamp(lowest, highest)
    width, zero_point = _best(rows, counts, unit, *candidates, levels)
    return torch.where(empty, torch.ones_like(unit), width * unit), zero_point


def _pairs(widths: Iterable[float], zero_points: Iterable[float], like: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs as two columns (candidates, 1)."""
    pairs = torch.tensor(list(itertools.product(widths, zero_points)), dtype=like.dtype, device=like.device)
    return pairs[:, :1], pairs[:, 1:]


def _best(
    rows: Tensor, counts: Tensor | None, unit: Tensor, width: Tensor, zero_point: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """Width, in units, and zero point (channels,) with the least error, among (candidates, channels or 1)."""
    width, zero_point = (each.expand(-1, len(rows)) for each in (width, zero_point))
    far = max(rows.shape[1] // _SHARE_OF_FAR, _FEWEST_FAR)
    if counts is None and far <= rows.shape[1] // 4:
        errors = _errors_of_near(
            rows, rows.gather(1, rows.abs().topk(far, dim=1).indices), unit, width, zero_point, levels
        )
    else:
        errors = _errors(rows, counts, unit, width, zero_point, levels)
    best = errors.argmin(0, keepdim=True)
    return width.gather(0, best).squeeze(0), zero_point.gather(0, best).squeeze(0)


def _errors_of_near(rows: Tensor, far: Tensor, unit: Tensor, width: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """Errors (candidates, channels) of the candidates that can be best, infinite for the others.

    What the values `far` from zero alone lose is less than all lose: candidates that cut off too much of them
    are out at a fraction of the cost.
    """
    least = _errors(far, None, unit, width, zero_point, levels)
    likely = least.argmin(0, keepdim=True)
    bound = _errors(rows, None, unit, width.gather(0, likely), zero_point.gather(0, likely), levels)
    candidates, channels = (least <= bound * _ROUNDING).nonzero(as_tuple=True)
    errors, chunk = torch.full_like(least, torch.inf), max(1, _CHUNK_ELEMENTS // rows.shape[1])
    for k, c in zip(candidates.split(chunk), channels.split(chunk), strict=True):
        scale = (width[k, c] * unit[c]).unsqueeze(1)
        errors[k, c] = _error(rows[c], None, scale, zero_point[k, c].unsqueeze(1), levels)
    return errors


def _errors(
    rows: Tensor, counts: Tensor | None, unit: Tensor, width: Tensor, zero_point: Tensor, levels: int
) -> Tensor:
    """Errors (candidates, channels) of widths, in units, and zero points, both of that shape."""
    chunk = max(1, _CHUNK_ELEMENTS // rows.numel())
    return torch.cat(
        [
            _error(rows, counts, (w * unit).unsqueeze(2), z.unsqueeze(2), levels)
            for w, z in zip(width.split(chunk), zero_point.split(chunk), strict=True)
        ]
    )


def _error(rows: Tensor, counts: Tensor | None, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """Summed error (m, channels) of `rows` (channels, n) for candidates (m, channels, 1); or (channels,) for one
    candidate each (channels, 1)."""
    error = (rows / scale).round_().add_(zero_point).clamp_(0, levels).sub_(zero_point).mul_(scale)
    error = error.sub_(rows).abs_().pow_(NORM)
    return (error if counts is None else error.mul_(counts)).sum(-1)
