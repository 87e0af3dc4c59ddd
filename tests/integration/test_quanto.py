"""optimum-quanto: weights and activations, frozen; frozen models refuse to be deep-copied."""

import copy

import pytest
import torch


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_frozen(judge, task, resnet, bits):
    from optimum.quanto import Calibration, freeze, quantize

    quantized = copy.deepcopy(resnet)
    quantize(quantized, weights=f"qint{bits}", activations="qint8")
    with torch.no_grad(), Calibration():
        for images in task.calibration:
            quantized(images)
    freeze(quantized)
    toolkit = {"toolkit": "optimum-quanto", "distribution": "optimum-quanto"}
    judge(quantized, resnet, **toolkit, bits=f"W{bits}A8", gains=bits == 2)
