"""Operations on whole activations that cost little, however these lie in memory."""

import torch
from torch import Tensor

_LOW_BIT_OF_EACH_BYTE = 0x0101010101010101


def axes_by_memory(x: Tensor, first: int = 0) -> list[int]:
    """The axes of `x` from the `first` on, that with the largest stride first."""
    return sorted(range(first, x.dim()), key=x.stride, reverse=True)


def coin_flips(like: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """Zeros and ones in the shape, type and memory format of `like`, ones with `probability`.

    An element costs one random bit where the probability is 1/2, else one random byte, so that other probabilities
    are rounded to the nearest 1/256. Numbers and not booleans: on the CPU, arithmetic with booleans and
    `torch.where` take 5 to 30 times as long.
    """
    count = like.numel()
    if probability == 0.5:
        words = _random_words(-(-count // 64), like.device, generator)
        shifts = torch.arange(8, device=like.device).unsqueeze(1)
        flips = (words >> shifts).bitwise_and_(_LOW_BIT_OF_EACH_BYTE).view(torch.uint8).view(-1)[:count].to(like.dtype)
    else:
        flips = _random_words(-(-count // 8), like.device, generator).view(torch.uint8)[:count].to(like.dtype)
        flips = flips.neg_().add_(round(probability * 256)).clamp_(0, 1)
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        batch, channels, height, width = like.shape
        return flips.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return flips.view(like.shape)


def _random_words(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """(count,) int64, every bit random."""
    return torch.empty(count, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """`(a * b).sum()`, without the product in memory where both lie alike in memory."""
    for view in (_row_of_contiguous, _row_of_channels_last):
        rows = view(a), view(b)
        if rows[0] is not None and rows[1] is not None:
            return torch.dot(*rows)
    return (a * b).sum()


def _row_of_contiguous(x: Tensor) -> Tensor | None:
    return x.view(-1) if x.is_contiguous() else None


def _row_of_channels_last(x: Tensor) -> Tensor | None:
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(-1)
    return None
