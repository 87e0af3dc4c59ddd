"""Brevitas: layers replaced by its own, with bias correction; the last one may return an `IntQuantTensor`."""

import copy
import tempfile

import pytest
import torch
from torch import nn

from .converters import exported, onnx_session

ENDS = ("conv1", "fc")  # 8 bits


@pytest.mark.parametrize("quant_tensor", [False, True], ids=["tensor", "IntQuantTensor"])
@pytest.mark.parametrize("bits", [2, 4])
def test_layerwise(judge, task, resnet, bits, quant_tensor):
    quantized = layerwise(copy.deepcopy(resnet), task, bits, quant_tensor)
    name = "Brevitas, IntQuantTensor" if quant_tensor else "Brevitas"
    own = {"distribution": "brevitas", "converters": (exported_for_inference, qcdq)}
    judge(quantized, resnet, **own, toolkit=name, bits=f"W{bits}A{bits}", gains=bits == 2)


def layerwise(model, task, bits, quant_tensor):
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloatMSE, ShiftedUint8ActPerTensorFloatMSE

    def layers(width, **last):
        common = {
            "weight_quant": Int8WeightPerChannelFloatMSE,
            "weight_bit_width": width,
            "input_quant": ShiftedUint8ActPerTensorFloatMSE,
            "input_bit_width": width,
            "return_quant_tensor": False,
        }
        return {nn.Conv2d: (qnn.QuantConv2d, common), nn.Linear: (qnn.QuantLinear, common | last)}

    last = {"output_quant": Int8ActPerTensorFloat, "return_quant_tensor": True} if quant_tensor else {}
    inner = [name for name, _ in model.named_modules() if name not in ENDS]
    model = layerwise_quantize(model, layers(8, **last), name_blacklist=inner)
    model = layerwise_quantize(model, layers(bits), name_blacklist=list(ENDS))
    for mode in (calibration_mode, bias_correction_mode):
        with torch.no_grad(), mode(model):
            for images in task.calibration:
                model(images)
    return model.eval()


def exported_for_inference(model, example):
    """`torch.export` of the layers in Brevitas' inference mode, which it makes for compilers."""
    from brevitas.export.inference import quant_inference_mode

    with quant_inference_mode(model, compile=True):
        model(example)  # scales and zero points are computed here
        return exported(model, example)


def qcdq(model, example):
    """Brevitas' own ONNX exporter."""
    from brevitas.export import export_onnx_qcdq

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        names = {"input_names": ["images"], "dynamic_axes": {"images": {0: "batch"}}}
        export_onnx_qcdq(model, args=example, export_path=path, **names, opset_version=17, dynamo=False)
        return onnx_session(path)
