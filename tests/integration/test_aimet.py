"""AIMET: its simulation is no module; the module inside returns `DequantizedTensor`."""

import copy

import pytest
import torch

DISTRIBUTION = {"distribution": "aimet-torch", "bits": "W4A4"}


@pytest.mark.parametrize("adaround", [False, True], ids=["plain", "AdaRound"])
def test_simulation(judge, task, resnet, adaround, tmp_path):
    sim = simulation(copy.deepcopy(resnet), task, tmp_path, adaround)
    judge(sim.model, resnet, **DISTRIBUTION, toolkit="AIMET AdaRound" if adaround else "AIMET", gains=True)


def simulation(model, task, folder, adaround):
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
        model = Adaround.apply_adaround(model, example, parameters, str(folder), "weights", default_param_bw=4)
    sim = QuantizationSimModel(model, example, default_param_bw=4, default_output_bw=4)
    if adaround:
        sim.set_and_freeze_param_encodings(str(folder / "weights.encodings"))

    @torch.no_grad()
    def calibrate(quantized):
        for images in task.calibration:
            quantized(images)

    sim.compute_encodings(calibrate)
    return sim
