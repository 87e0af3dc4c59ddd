"""torchao: weights of linear layers by `quantize_`, and prepare and convert of an exported program (pt2e)."""

import copy

import pytest
import torch

from .converters import ANY_BATCH_SIZE

TOOLKIT = {"toolkit": "torchao quantize_", "distribution": "torchao"}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights(judge, vit, bits):
    # Int4WeightOnlyConfig packs for accelerators only; this is torchao's way to fewer than 8 bits on the CPU.
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    low = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity=PerGroup(32))
    quantized = copy.deepcopy(vit)
    quantize_(quantized, Int8WeightOnlyConfig() if bits == 8 else low)
    judge(quantized, vit, **TOOLKIT, bits=f"W{bits}", gains=bits == 2)


@pytest.mark.parametrize("bits", [3, 8])
def test_pt2e(judge, task, resnet, bits):
    from torchao.quantization.pt2e import HistogramObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationSpec, x86_inductor_quantizer

    acts = QuantizationSpec(
        dtype=torch.uint8,
        observer_or_fake_quant_ctr=HistogramObserver.with_args(eps=2**-12),
        quant_min=0,
        quant_max=2**bits - 1,
        qscheme=torch.per_tensor_affine,
    )
    weights = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-12),
        quant_min=-(2 ** (bits - 1)),
        quant_max=2 ** (bits - 1) - 1,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    quantizer = x86_inductor_quantizer.X86InductorQuantizer()
    quantizer.set_global(x86_inductor_quantizer.QuantizationConfig(acts, acts, weights, None))
    # A copy: the exported program shares its weights with the model. Strict: the quantizer needs to tell calls apart.
    program = torch.export.export(
        copy.deepcopy(resnet),
        (task.calibration[0],),
        dynamic_shapes=ANY_BATCH_SIZE,
        strict=True,
    )
    prepared = prepare_pt2e(program.module(), quantizer)
    for images in task.calibration:
        prepared(images)
    quantized = convert_pt2e(prepared)
    judge(quantized, resnet, toolkit="torchao pt2e", distribution="torchao", bits=f"W{bits}A{bits}", gains=False)
