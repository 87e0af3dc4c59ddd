import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cat_plugin import CATConfig, apply_cat
from tests.cat_plugin.helpers import images, model_pair

ROOT = Path(__file__).parents[3]
WORKER = """
import json, sys, torch
from torch import distributed
from safetensors.torch import save_file
from cat_plugin import CATConfig, CATError, apply_cat, fit_cluster_affine
from tests.cat_plugin.helpers import images, model_pair

rank, folder, config = int(sys.argv[1]), sys.argv[2], CATConfig(**json.loads(sys.argv[3]))
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
x = images(400)
cat_model = apply_cat(*model_pair(), (x[:150], x[150:])[rank], config=config)
if rank == 0:  # on tensors, a fit is this process's own affair
    fit_cluster_affine(torch.randn(50, 3), torch.randn(50, 3))
save_file(dict(cat_model.correction.named_buffers()), f"{folder}/{rank}.safetensors")
assert cat_model.report.images == 400
distributed.destroy_process_group()
"""


FAILING = """
import sys, torch
from torch import distributed
from cat_plugin import CATError, apply_cat
from tests.cat_plugin.helpers import images, model_pair

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
x = images(100)
try:
    apply_cat(*model_pair(), x if rank == 0 else x / 0)
except CATError as error:
    assert ("1 other processes" if rank == 0 else "NaN or infinite logits") in str(error), error
else:
    raise SystemExit("nothing was raised")
distributed.barrier()
distributed.destroy_process_group()
"""


def run_workers(code, folder, config):
    """Runs `code` as two processes, which have to succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [str(folder), json.dumps(config)]
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), *arguments], env=environment, cwd=ROOT)
        for rank in (0, 1)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()


def test_failure_of_one_process_reaches_all(tmp_path):
    run_workers(FAILING, tmp_path, {})


@pytest.mark.parametrize(
    "config",
    [{}, {"num_clusters": 5}, {"mode": "paper", "num_clusters": 8, "alpha": 0.4}],
    ids=["auto", "clusters", "paper"],
)
def test_two_processes_fit_what_one_does(tmp_path, config):
    from safetensors.torch import load_file

    run_workers(WORKER, tmp_path, config)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    expected = dict(apply_cat(*model_pair(), images(400), config=CATConfig(**config)).correction.named_buffers())
    assert first.keys() == second.keys() == expected.keys()
    for name, buffer in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], buffer, atol=1e-4, rtol=1e-4)
