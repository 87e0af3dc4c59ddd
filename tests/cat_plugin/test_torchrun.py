"""Two processes that differ in everything they may differ in end alike: with one result, or with errors, in time."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START = """
import json, sys, time, torch
from torch import distributed
from cat_plugin import CATConfig, CATError, apply_cat
from cat_plugin.running.digests import image_digests
from tests.cat_plugin.helpers import images, model_pair

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
quantized, fp = (model.eval() for model in model_pair())
x = images(400)
def labels(part):
    with torch.no_grad():
        return fp(part).argmax(1)
def tell(**what):
    open(f"{folder}/{rank}.json", "w").write(json.dumps(what))
def digest(cat_model):
    return [float(buffer.double().sum()) for buffer in cat_model.correction.buffers()]
def models():
    return (model.eval() for model in model_pair())
"""
END = """
distributed.barrier()
distributed.destroy_process_group()
"""


def run(code, folder, limit=120):
    """Runs `code` in two processes; what each told, and how many seconds it took."""
    import json

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", START + code + END, str(rank), str(folder)],
            env=environment,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [worker.communicate(timeout=limit)[1] for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0], errors
    finally:
        for worker in workers:
            worker.kill()
    assert time.monotonic() - start < limit
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_one_process_knows_its_calibration_and_the_other_does_not(tmp_path):
    first, second = run(
        """
if rank == 0:
    quantized.calibration_digests = set(image_digests(x[:200]))
cat_model = apply_cat(quantized, fp, x[:200] if rank == 0 else x[200:])
tell(numbers=digest(cat_model), warnings=[w for w in cat_model.report.warnings if "calibrated on" in w])
""",
        tmp_path,
    )
    assert first["numbers"] == second["numbers"]
    assert first["warnings"] == second["warnings"] != []


def test_a_process_without_images(tmp_path):
    first, second = run(
        """
cat_model = apply_cat(quantized, fp, x if rank == 1 else [], eval_loader=[(x, labels(x))] if rank == 1 else [])
report = cat_model.report
tell(numbers=digest(cat_model), images=report.images, top1=report.accuracy.cat_top1, counted=report.accuracy.images)
""",
        tmp_path,
    )
    assert first == second
    assert first["images"] == first["counted"] == 400


def test_no_process_has_images(tmp_path):
    for told in run(
        """
try:
    apply_cat(quantized, fp, [])
except CATError as error:
    tell(error=str(error))
""",
        tmp_path,
    ):
        assert "the loader yielded no images" in told["error"]


def test_labelled_images_are_those_of_all_processes_and_padded_ones_count_once(tmp_path):
    first, second = run(
        """
mine = x[:201] if rank == 0 else torch.cat([x[201:], x[:1]])  # padded with the first one, as DistributedSampler does
cat_model = apply_cat(quantized, fp, mine, eval_loader=[(part, labels(part)) for part in mine.split(64)])
tell(**{name: getattr(cat_model.report.accuracy, name) for name in ("images", "quantized_top1", "cat_top1", "fp_top1")})
""",
        tmp_path,
    )
    assert first == second
    assert first["images"] == 400
    import torch

    from cat_plugin import apply_cat
    from tests.cat_plugin.helpers import images, model_pair

    quantized, fp = (model.eval() for model in model_pair())
    x = images(400)
    with torch.no_grad():
        targets = fp(x).argmax(1)
    alone = apply_cat(quantized, fp, x, eval_loader=[(x, targets)]).report.accuracy
    assert first["quantized_top1"] == pytest.approx(alone.quantized_top1)
    assert first["cat_top1"] == pytest.approx(alone.cat_top1, abs=0.3)


FAILURES = {
    "while collecting": "apply_cat(quantized, fp, x if rank == 0 else x / 0)",
    "before the first batch": "apply_cat(quantized, fp, x if rank == 0 else 5)",
    "at the first labels": "apply_cat(quantized, fp, x[200 * rank:][:200], eval_loader=[(x, labels(x) + 100 * rank)])",
    "in evaluation": "apply_cat(quantized, fp, x[200 * rank:][:200], "
    "eval_loader=[(x, labels(x)), (x, labels(x) + 100 * rank)])",
    "by the user's loader": "apply_cat(quantized, fp, x if rank == 0 else (1 / 0 for _ in range(3)))",
    "at the first look at the models": "apply_cat(quantized, fp if rank == 0 else quantized, x)",
    "before that": "apply_cat(quantized, fp if rank == 0 else 5, x)",
    "while fitting": "apply_cat(quantized, fp, x[200 * rank:][:200])",
    "in a step of the layers": "apply_cat(failing(quantized, rank), fp, x[200 * rank:][:200])",
    "as views are made": "apply_cat(quantized, fp, x[200 * rank:][:200], augment=lambda x: x if rank == 0 else 1 / 0)",
    "by views of another shape": "apply_cat(quantized, fp, x[200 * rank:][:200], augment=lambda x: x[:, rank:])",
    "after that": "apply_cat(quantized, fp, x[200 * rank:][:200])",
}


def test_an_error_of_one_process_ends_all_within_seconds(tmp_path):
    """One after the other, in the same two processes, so that each also shows that the one before left them in step."""
    first, second = run(
        f"""
import cat_plugin.api as api
failures = {FAILURES}
def failing(model, rank):
    # In a pass with gradients, after those that try whether there are any.
    passes = []
    def hook(module, args, output):
        passes.append(torch.is_grad_enabled())
        if rank == 1 and sum(passes) > 4:
            raise MemoryError("in a step")
    model.last.register_forward_hook(hook)
    return model
def breaking(name):
    return lambda *args, **kwargs: 1 / 0
told = {{}}
for when, code in failures.items():
    quantized, fp = models()
    start, broken = time.monotonic(), {{"while fitting": "fit_both_levels", "after that": "CATReport"}}.get(when)
    real = getattr(api, broken) if broken else None
    if broken and rank == 1:
        setattr(api, broken, breaking(broken))
    try:
        exec(code)
    except Exception as error:
        told[when] = f"{{type(error).__name__}}: {{error}}", time.monotonic() - start, len(quantized._forward_hooks)
    if broken:
        setattr(api, broken, real)
quantized, fp = models()
tell(told=told, images=apply_cat(quantized, fp, x[200 * rank:][:200]).report.images)
""",
        tmp_path,
    )
    assert first["images"] == second["images"] == 400
    for when in FAILURES:
        (ours, seconds, hooks), (theirs, _, other_hooks) = first["told"][when], second["told"][when]
        assert ours.startswith("CATError: 1 other processes failed"), when
        assert "other processes" not in theirs, when
        assert seconds < 60, when
        assert hooks == other_hooks == 0, when


def test_outputs_of_other_kinds_are_an_error_of_both(tmp_path):
    for told in run(
        """
quantized, fp = (model.eval() for model in model_pair(10 + rank))
try:
    apply_cat(quantized, fp, x)
except CATError as error:
    tell(error=str(error))
""",
        tmp_path,
    ):
        assert "outputs of several kinds: 10 classes" in told["error"]


def test_processes_that_are_asked_for_different_things(tmp_path):
    layers = "{'config': CATConfig(layers=['none', 'all'][rank])}"
    differing = f"{{'config': CATConfig(seed=rank)}}, {layers}, {{'eval_loader': [None, []][rank]}}"
    for told in run(
        f"""
errors = []
for options in ({differing}):
    try:
        apply_cat(quantized, fp, x, **options)
    except CATError as error:
        errors.append(str(error))
tell(errors=errors, hooks=len(quantized._forward_hooks))
""",
        tmp_path,
    ):
        assert told["hooks"] == 0
        assert len(told["errors"]) == 3
        assert all(error.startswith("the processes were asked for different things: CATC") for error in told["errors"])


def test_layers_are_those_of_all_processes_and_close_to_those_of_one(tmp_path):
    first, second = run(
        """
from tests.cat_plugin.layers.networks import distance, pictures, planted
x, config = pictures(128), CATConfig(layers="all")
def outputs(model):
    with torch.no_grad():
        return model(pictures(50, seed=9))
quantized, fp = planted()
plain, expected = outputs(quantized), outputs(fp)
together = apply_cat(quantized, fp, x[:40] if rank == 0 else x[40:], config=config)
found = outputs(quantized)
evidence = together.report.layers
numbers = [part.tolist() for layer in together.layers.values() for part in (layer.scale, layer.shift)]
distributed.barrier()
distributed.destroy_process_group()
alone = apply_cat(*planted(), x, config=config)
tell(numbers=numbers, images=evidence.images, left=distance(found, expected) / distance(plain, expected),
     apart=distance(found, outputs(alone)) / distance(plain, expected))
distributed.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=2)
""",
        tmp_path,
    )
    assert first["numbers"] == second["numbers"] != []
    assert first["images"] == 128
    assert first["left"] < 0.6 and first["apart"] < 0.4
