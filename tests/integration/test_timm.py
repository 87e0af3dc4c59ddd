"""timm: a vision transformer, quantized by this repository's own baselines."""

import pytest
import torch

from baselines import quantize


@pytest.mark.parametrize("bits", [(2, 4), (8, 8)], ids=str)
def test_vision_transformer(judge, task, vit, bits):
    weights, activations = bits
    low_bit = quantize(vit, torch.cat(task.calibration), method="rtn", w_bits=weights, a_bits=activations, seed=0)
    name = f"W{weights}A{activations}"
    judge(low_bit, vit, toolkit="timm, our baselines", distribution="timm", bits=name, gains=weights == 2)
