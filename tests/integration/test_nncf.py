"""NNCF: eight bits for weights and activations, of a module or an exported program; fewer for weights only."""

import copy

import torch

from .converters import ANY_BATCH_SIZE


def test_weights_and_activations(judge, task, resnet):
    import nncf

    quantized = nncf.quantize(copy.deepcopy(resnet), nncf.Dataset(task.calibration))
    judge(quantized, resnet, toolkit="NNCF", distribution="nncf", bits="W8A8", gains=False)


def test_exported_program(judge, task, resnet):
    import nncf

    program = torch.export.export(copy.deepcopy(resnet), (task.calibration[0],), dynamic_shapes=ANY_BATCH_SIZE)
    quantized = nncf.quantize(program.module(), nncf.Dataset(task.calibration))
    judge(quantized, resnet, toolkit="NNCF, torch.fx", distribution="nncf", bits="W8A8", gains=False)


def test_weights(judge, task, vit):
    import nncf

    four = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 16, "all_layers": True}
    quantized = nncf.compress_weights(copy.deepcopy(vit), dataset=nncf.Dataset(task.calibration), **four)
    judge(quantized, vit, toolkit="NNCF", distribution="nncf", bits="W4", gains=False)
