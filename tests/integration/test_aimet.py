"""AIMET: its simulation is no module; the module inside returns `DequantizedTensor`."""

import copy
import tempfile

import pytest
import torch

from .converters import ANY_BATCH_SIZE, onnx_session
from .networks import plain


@pytest.mark.parametrize(("method", "bits"), [("plain", 4), ("AdaRound", 4), ("plain", 8)])
def test_simulation(judge, task, resnet, method, bits, tmp_path):
    sim = simulation(copy.deepcopy(resnet), task, bits, tmp_path if method == "AdaRound" else None)
    own = {"distribution": "aimet-torch", "converters": (aimet_exported, aimet_onnx), "wrapper": sim}
    name = "AIMET" if method == "plain" else f"AIMET {method}"
    judge(sim.model, resnet, **own, toolkit=name, bits=f"W{bits}A{bits}", gains=bits == 4)


def simulation(model, task, bits, adaround=None):
    """`adaround`: a folder for its encodings."""
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    example = task.calibration[0]
    model = prepare_model(model)
    fold_all_batch_norms(model, example.shape, dummy_input=example)
    if adaround:
        batches = [(images,) for images in task.calibration]
        parameters = AdaroundParameters(batches, len(batches), 200, forward_fn=lambda layer, batch: layer(*batch))
        model = Adaround.apply_adaround(model, example, parameters, str(adaround), "weights", default_param_bw=bits)
    sim = QuantizationSimModel(model, example, default_param_bw=bits, default_output_bw=bits)
    if adaround:
        sim.set_and_freeze_param_encodings(str(adaround / "weights.encodings"))

    @torch.no_grad()
    def calibrate(quantized):
        for images in task.calibration:
            quantized(images)

    sim.compute_encodings(calibrate)
    return sim


def aimet_exported(model, example):
    """AIMET's own `torch.export`, which writes scales and zero points as constants."""
    from aimet_torch.experimental.export.export import export

    program = export(model, (example,), dynamic_shapes=ANY_BATCH_SIZE).module()
    return lambda images: plain(program(images))


def aimet_onnx(model, example):
    """AIMET's own ONNX exporter; operators on 4 bits came with opset 21."""
    from aimet_torch.onnx import export

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        export(model, (example,), path, opset_version=21, dynamo=True, dynamic_shapes=ANY_BATCH_SIZE, verbose=False)
        return onnx_session(path)
