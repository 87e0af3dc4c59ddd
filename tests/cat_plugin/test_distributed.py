import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cat_plugin import CATConfig, apply_cat
from tests.cat_plugin.helpers import images, model_pair

ROOT = Path(__file__).parents[2]
WORKER = """
import json, sys, torch
from torch import distributed
from safetensors.torch import save_file
from cat_plugin import CATConfig, apply_cat
from tests.cat_plugin.helpers import images, model_pair

rank, folder, config = int(sys.argv[1]), sys.argv[2], CATConfig(**json.loads(sys.argv[3]))
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
x = images(400)
cat_model = apply_cat(*model_pair(), (x[:150], x[150:])[rank], config=config)
save_file(dict(cat_model.correction.named_buffers()), f"{folder}/{rank}.safetensors")
assert cat_model.report.images == 400
distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    "config",
    [{}, {"features": "first"}, {"mode": "paper", "num_clusters": 8, "alpha": 0.4}],
    ids=["auto", "features", "paper"],
)
def test_two_processes_fit_what_one_does(tmp_path, config):
    from safetensors.torch import load_file

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [str(tmp_path), json.dumps(config)]
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), *arguments], env=environment, cwd=ROOT)
        for rank in (0, 1)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    expected = dict(apply_cat(*model_pair(), images(400), config=CATConfig(**config)).correction.named_buffers())
    assert first.keys() == second.keys() == expected.keys()
    for name, buffer in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], buffer, atol=1e-4, rtol=1e-4)
