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
def expect(*texts):
    return next((text for text in texts if text is not None), None)
"""


def run(code, folder, limit=60):
    """Runs `code` in two processes; what each told, and how many seconds it took."""
    import json

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", START + code, str(rank), str(folder)],
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
    "in evaluation": "apply_cat(quantized, fp, x[200 * rank:][:200], eval_loader=[(x, labels(x) + 100 * rank)])",
    "by the user's loader": """apply_cat(quantized, fp, x if rank == 0 else (1 / 0 for _ in range(3)))""",
    "while fitting": """
import cat_plugin.api as api
if rank == 1:
    real = api.fit_and_score
    def broken(store, *args):
        store.take = lambda rows: 1 / 0
        return real(store, *args)
    api.fit_and_score = broken
apply_cat(quantized, fp, x[200 * rank:][:200])
""",
}


@pytest.mark.parametrize("code", FAILURES.values(), ids=FAILURES)
def test_an_error_of_one_process_ends_all_within_seconds(tmp_path, code):
    body = "\n".join("    " + line for line in code.strip().splitlines())
    first, second = run(
        f"""
start = time.monotonic()
try:
{body}
except Exception as error:
    tell(error=f"{{type(error).__name__}}: {{error}}", seconds=time.monotonic() - start,
         hooks=len(quantized._forward_hooks))
distributed.barrier()
distributed.destroy_process_group()
""",
        tmp_path,
    )
    assert first["error"].startswith("CATError: 1 other processes failed")
    assert "other processes" not in second["error"]
    assert first["hooks"] == second["hooks"] == 0


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
