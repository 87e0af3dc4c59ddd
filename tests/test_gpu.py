"""What has to hold on a GPU, whatever kind it is: `make test ARGS="-m gpu"`."""

import contextlib
import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baselines import quantize
from baselines.quantization.layers import quantized_layers
from baselines.reconstruction import unit_run
from cat_plugin import CATConfig, CATWrapper, apply_cat, compare_accuracy
from tests.baselines.networks import SmallResNet, images, randomized
from tests.cat_plugin.helpers import state_of
from tests.cat_plugin.layers.networks import distance, pictures, planted

HAS_ONE = hasattr(torch, "accelerator") and torch.accelerator.is_available()
DEVICE = torch.accelerator.current_accelerator() if HAS_ONE else None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE is None, reason="there is no GPU")]
ALL = CATConfig(layers="all")
METHODS = ["rtn", "adaround", "brecq", "qdrop", "pd_quant"]


def outputs(model, x):
    device = next(p.device for p in model.parameters())
    with torch.no_grad():
        return model(x.to(device)).float().cpu()


def on_device(*models):
    return [copy.deepcopy(model).eval().to(DEVICE) for model in models]


def learned(method, fp=None, **options):
    (fp,) = on_device(randomized(SmallResNet()) if fp is None else fp)
    x = images(64).to(next(fp.parameters()).dtype)
    return quantize(fp, x, method=method, w_bits=2, a_bits=4, iters=200, batch_size=16, seed=0, **options)


@pytest.mark.parametrize("method", METHODS)
def test_methods_learn_there_what_they_learn_on_the_processor(method, caplog):
    fp, x = randomized(SmallResNet()), images(64, seed=3)
    with caplog.at_level(logging.INFO, logger="baselines"):
        there = learned(method)
    assert "cannot be recorded" not in caplog.text
    assert {p.device.type for p in there.parameters()} == {DEVICE.type}
    here = quantize(fp, images(64), method=method, w_bits=2, a_bits=4, iters=200, batch_size=16, seed=0)
    rounded = quantize(fp, images(64), method="rtn", w_bits=2, a_bits=4)
    expected = outputs(fp, x)
    near, far = (distance(outputs(model, x), expected) for model in (here, rounded))
    assert distance(outputs(there, x), expected) < near + 0.2 * (far - near) + 0.05 * far
    for layer in quantized_layers(there).values():
        quantizer = layer.weight_quantizer
        integers = layer.weight / quantizer.scale + quantizer.zero_point
        torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["adaround", "qdrop", "pd_quant"])
def test_recorded_iterations_learn_as_well_as_plain_ones(method, monkeypatch):
    expected, x = outputs(randomized(SmallResNet()), images(64, seed=3)), images(64, seed=3)
    recorded = learned(method)
    monkeypatch.setattr(unit_run, "recorder_for", lambda device: None)
    plain = learned(method)
    far = distance(outputs(learned("rtn"), x), expected)
    errors = [distance(outputs(model, x), expected) for model in (recorded, plain)]
    assert errors[0] < errors[1] + 0.1 * far
    if method == "adaround":  # whose only random numbers are the batches
        pairs = zip(quantized_layers(recorded).values(), quantized_layers(plain).values(), strict=True)
        alike = [(a.weight == b.weight).float().mean().item() for a, b in pairs]
        assert min(alike) > 0.9


def test_same_seed_same_network():
    first, second = learned("qdrop"), learned("qdrop")
    x = images(64, seed=3)
    assert distance(outputs(first, x), outputs(second, x)) < 0.05


def test_where_data_are_kept_makes_no_difference():
    x = images(64, seed=3)
    kept, away = learned("qdrop"), learned("qdrop", cache_device="cpu")
    assert distance(outputs(away, x), outputs(kept, x)) < 0.05


class Reading(torch.nn.Module):
    """A block that reads a value on the host, which no record can hold."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 6, 3), torch.nn.Conv2d(6, 4, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.second(x * (1.0 if x.sum().item() > -1 else 0.0)).mean((2, 3))


def test_what_reads_values_is_not_recorded_and_nothing_stays_behind(caplog):
    module = torch.get_device_module(DEVICE)
    (fp,) = on_device(torch.nn.Sequential(Reading(), torch.nn.Linear(4, 3)))
    stream = module.current_stream()
    with caplog.at_level(logging.INFO):
        quantized = quantize(fp, images(64), method="qdrop", w_bits=2, a_bits=4, iters=40, batch_size=16, blocks=["0"])
        assert "iterations are launched kernel by kernel" in caplog.text
        apply_cat(quantized, fp, images(128, seed=2), config=ALL)
        assert "steps are launched kernel by kernel" in caplog.text
    assert module.current_stream() == stream
    torch.randn(10, device=DEVICE)
    module.empty_cache()
    assert module.get_sync_debug_mode() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    fp = randomized(SmallResNet()).to(dtype)
    for method in ("rtn", "qdrop"):
        quantized = learned(method, fp)
        assert {p.dtype for p in quantized.parameters()} == {dtype}
        assert torch.isfinite(outputs(quantized, images(8).to(dtype))).all()
    quantized, fp = (model.to(dtype) for model in on_device(*planted()))
    x = pictures(100, seed=9).to(dtype)
    plain, expected = outputs(quantized, x), outputs(fp, x)
    cat_model = apply_cat(quantized, fp, pictures(64).to(dtype), config=ALL)
    assert cat_model.layers, cat_model.report.layers.reason
    assert distance(outputs(cat_model.quantized_model, x), expected) < 0.7 * distance(plain, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_is_that_of_the_caller(dtype, caplog):
    quantized, fp = on_device(*planted())
    x = pictures(100, seed=9)
    plain, expected = outputs(quantized, x), outputs(fp, x)
    with torch.autocast(DEVICE.type, dtype), caplog.at_level(logging.INFO, logger="cat_plugin"):
        cat_model = apply_cat(quantized, fp, pictures(64), config=ALL)
    assert "cannot be recorded" not in caplog.text
    assert cat_model.layers, cat_model.report.layers.reason
    assert distance(outputs(cat_model.quantized_model, x), expected) < 0.7 * distance(plain, expected)


@pytest.fixture(scope="module")
def fitted():
    quantized, fp = on_device(*planted())
    return apply_cat(quantized, fp, pictures(64), config=ALL), fp


def test_layers_are_corrected_as_on_the_processor(fitted):
    cat_model, fp = fitted
    x = pictures(100, seed=9)
    here = apply_cat(*planted(), pictures(64), config=ALL)
    with cat_model.disabled():
        plain = distance(outputs(cat_model.quantized_model, x), outputs(fp, x))
    there = distance(outputs(cat_model.quantized_model, x), outputs(fp, x))
    assert there < 0.6 * plain
    assert there < distance(outputs(here.quantized_model, x), outputs(fp, x)) + 0.1 * plain
    assert {correction.scale.device.type for correction in cat_model.layers.values()} == {DEVICE.type}
    assert cat_model.report.layers.accepted


def test_report_of_labels(fitted):
    cat_model, fp = fitted
    x = pictures(100, seed=9)
    compared = compare_accuracy(fp, cat_model.quantized_model, cat_model, [(x, outputs(fp, x).argmax(1))])
    assert compared.fp_top1 == 100 and compared.cat_top1 > compared.quantized_top1


def test_bake_compile_and_export(fitted):
    cat_model, _ = fitted
    x = pictures(32, seed=9).to(DEVICE)
    expected = outputs(cat_model.quantized_model, x)
    torch.testing.assert_close(outputs(cat_model.bake(), x), expected, rtol=1e-4, atol=1e-4)
    assert distance(outputs(cat_model.bake(fold=True), x), expected) < 0.02
    baked = cat_model.bake()
    exported = torch.export.export(baked, (x,)).module()
    compiled = torch.compile(baked)
    # Other kernels sum in another order, and a few activations are rounded to the step beside.
    for other in (exported, compiled):
        with torch.no_grad():
            assert distance(other(x).cpu(), expected) < 0.02


def test_save_load_and_move(fitted, tmp_path):
    cat_model, _ = fitted
    x = pictures(32, seed=9)
    cat_model.save_pretrained(tmp_path)
    for device in (DEVICE, torch.device("cpu")):
        quantized = planted()[0].to(device)
        loaded = CATWrapper.from_pretrained(tmp_path, quantized)
        expected = outputs(cat_model.quantized_model, x)
        torch.testing.assert_close(outputs(loaded.quantized_model, x), expected, rtol=1e-3, atol=1e-3)


def test_remove_gives_the_model_back():
    quantized, fp = on_device(*planted())
    before = state_of(quantized)
    state = torch.get_device_module(DEVICE).get_rng_state()
    cat_model = apply_cat(quantized, fp, pictures(64), config=ALL)
    cat_model.remove()
    assert state_of(quantized) == before
    assert torch.equal(torch.get_device_module(DEVICE).get_rng_state(), state)


@contextlib.contextmanager
def default_device(device):
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before)


def test_default_device_does_not_matter():
    fp = randomized(SmallResNet())
    quantized, fp_planted = planted()
    x, calibration, pictured = images(64, seed=3), images(64), pictures(64)
    plain = quantize(fp, calibration, method="qdrop", w_bits=2, a_bits=4, iters=30, batch_size=16)
    expected = outputs(plain, x)
    corrected = outputs(apply_cat(quantized, fp_planted, pictured, config=ALL).quantized_model, pictured)
    again, fp_again = planted()
    with default_device(DEVICE):
        under = quantize(fp, calibration, method="qdrop", w_bits=2, a_bits=4, iters=30, batch_size=16)
        corrected_under = outputs(apply_cat(again, fp_again, pictured, config=ALL).quantized_model, pictured)
    assert torch.equal(outputs(under, x), expected)
    torch.testing.assert_close(corrected_under, corrected)


TWO = """
import json, sys, torch
from torch import distributed
from cat_plugin import CATConfig, apply_cat
from tests.cat_plugin.layers.networks import pictures, planted
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
device = torch.accelerator.current_accelerator()
quantized, fp = (model.eval().to(device) for model in planted())
cat_model = apply_cat(quantized, fp, pictures(128)[64 * rank:][:64], config=CATConfig(layers="all"))
told = {name: part.scale.tolist() + part.shift.tolist() for name, part in cat_model.layers.items()}
open(f"{folder}/{rank}.json", "w").write(json.dumps(told))
distributed.barrier()
distributed.destroy_process_group()
"""


def test_two_processes_on_one_device_have_one_result(tmp_path):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    workers = [
        subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(tmp_path)], env=environment, cwd=root)
        for rank in (0, 1)
    ]
    assert [worker.wait(timeout=180) for worker in workers] == [0, 0]
    first, second = ((tmp_path / f"{rank}.json").read_text() for rank in (0, 1))
    assert first == second and len(first) > 100
