"""What `cat_plugin` and `baselines` do alike without importing each other, held in one place.

A model that `baselines` quantized tells which images it was calibrated on; `cat_plugin` recognises them by the same
digests. Loaders that the one takes, the other takes, too. Both leave random states alone and write files whole.
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from baselines import quantize
from baselines.files import atomic_path
from baselines.inputs import gather_inputs
from cat_plugin import CATError
from cat_plugin.running.digests import image_digests, known_calibration
from cat_plugin.running.loaders import iterate_inputs
from cat_plugin.saving.files import replacing
from tests.baselines.networks import SmallResNet, images

X = images(12)
LABELS = torch.arange(12)


@pytest.mark.parametrize(
    "given", [X, X.half(), X.to(memory_format=torch.channels_last), X.flip(0)], ids=["float", "half", "last", "flipped"]
)
def test_calibration_images_are_recognised(given):
    quantized = quantize(SmallResNet().eval(), given, method="rtn", w_bits=8, a_bits=8)
    assert known_calibration(quantized) == set(image_digests(given))
    assert not known_calibration(quantized) & set(image_digests(X + 1))


LOADERS = {
    "tensor": X,
    "list of tensors": list(X.split(5)),
    "tuples of one": [(part,) for part in X.split(5)],
    "images and labels": [(part, label) for part, label in zip(X.split(5), LABELS.split(5), strict=True)],
    "lists": [[part, label] for part, label in zip(X.split(5), LABELS.split(5), strict=True)],
    "dict": [{"image": part, "label": label} for part, label in zip(X.split(5), LABELS.split(5), strict=True)],
    "dict of Hugging Face": [{"pixel_values": part, "labels": LABELS[:5]} for part in X.split(5)],
    "dict with one tensor": [{"anything": part, "y": LABELS[:5]} for part in X.split(5)],
    "DataLoader": DataLoader(TensorDataset(X, LABELS), batch_size=5),
}


@pytest.mark.parametrize("name", LOADERS)
def test_both_read_the_same_loaders(name):
    loader = LOADERS[name]
    ours = torch.cat([inputs for inputs, _ in iterate_inputs(loader)])
    theirs = gather_inputs(loader)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, X)


REFUSED = {"text": ["a"], "empty": [], "two tensors": [{"a": X, "b": X}], "numbers": 5}


@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse_the_same_loaders(name):
    with pytest.raises(CATError):
        list(iterate_inputs(REFUSED[name]))
    with pytest.raises((ValueError, TypeError)):
        gather_inputs(REFUSED[name])


def test_random_states_are_kept():
    network = SmallResNet().eval()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    quantize(network, X, method="qdrop", w_bits=4, a_bits=4, iters=1, batch_size=4)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (repr(np.random.get_state()), random.getstate()) == before[1:]


@pytest.mark.parametrize("write", [atomic_path, replacing], ids=["baselines", "cat_plugin"])
def test_files_are_written_whole_or_not_at_all(write, tmp_path):
    target = Path(tmp_path) / "file"
    target.write_text("old")
    with pytest.raises(KeyError), write(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"
    with write(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "new"
