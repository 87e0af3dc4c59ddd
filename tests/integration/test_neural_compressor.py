"""Intel Neural Compressor: round-to-nearest weights, and static quantization of an exported program."""

import copy

import pytest

from .converters import ANY_BATCH_SIZE

TOOLKIT = {"distribution": "neural-compressor"}


@pytest.mark.parametrize("bits", [2, 4])
def test_weights(judge, vit, bits):
    from neural_compressor.torch.quantization import RTNConfig, convert, prepare

    quantized = convert(prepare(copy.deepcopy(vit), RTNConfig(bits=bits, group_size=32)))
    judge(quantized, vit, **TOOLKIT, toolkit="neural-compressor RTN", bits=f"W{bits}", gains=bits == 2)


def test_static(judge, task, resnet):
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare

    example = task.calibration[:1]
    program = export(copy.deepcopy(resnet), tuple(example), dynamic_shapes=ANY_BATCH_SIZE)
    prepared = prepare(program, StaticQuantConfig(), example_inputs=tuple(example))
    for images in task.calibration:
        prepared(images)
    judge(convert(prepared), resnet, **TOOLKIT, toolkit="neural-compressor static", bits="W8A8", gains=False)
