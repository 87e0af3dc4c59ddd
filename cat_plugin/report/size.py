"""How large a quantized model is at the bit widths of its weights."""

import math

import torch
from torch import Tensor, nn

from cat_plugin.running.tensors import state_tensors, storage_leaves

MAX_BITS = 8
ROWS = 16
"""Of a tensor, that are looked at."""


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, of quantized weights at the bits that their values need.

    Packed tensors count as they are stored. Toolkits that simulate quantization keep low-bit values in floating-point
    tensors: one with few distinct values in each output channel counts with as many bits as tell these apart. Where a
    model rounds its weights only as it runs, or channels are too short to tell, tensors count as stored, so that the
    figure is an upper limit.
    """
    total, seen = 0, set()
    for _, tensor in state_tensors(model):
        for leaf in storage_leaves(tensor):
            address = leaf.data_ptr() if leaf.layout == torch.strided else 0
            key = (leaf.device, address, leaf.shape) if address else id(leaf)  # tied weights count once
            if key not in seen:
                seen.add(key)
                total += math.ceil(leaf.numel() * bits_per_number(leaf) / 8)
    return total


def bits_per_number(tensor: Tensor) -> int:
    """Bits that tell the numbers of a tensor apart, or those they are stored in, see `model_bytes`."""
    stored = 8 * tensor.element_size()
    plain = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
    if not plain or tensor.ndim < 2 or stored <= MAX_BITS:
        return stored
    rows = tensor[:: max(len(tensor) // ROWS, 1)].flatten(1)
    if rows.shape[1] < 2 or rows.shape[0] == 0:
        return stored
    ordered = rows.float().sort(dim=1).values
    distinct = 1 + (ordered.diff(dim=1) != 0).sum(dim=1)
    filled = (rows != 0).sum(dim=1)  # what is pruned to zero tells nothing about the others
    apart = int((distinct - (filled < rows.shape[1]).int()).max())
    bits = max(math.ceil(math.log2(int(distinct.max()))), 1)
    return bits if bits <= MAX_BITS and apart <= int(filled.max()) / 2 else stored
