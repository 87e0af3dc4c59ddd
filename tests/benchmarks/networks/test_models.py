import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks import BenchmarkError
from benchmarks.networks.models import MODELS, check_outputs, load_weights
from benchmarks.networks.weights_and_transforms import untrained


@pytest.mark.parametrize(
    ("name", "channels", "size"), [("resnet8", 1, 8), ("resnet20", 3, 32), ("mobilenetv2", 3, 32), ("vit", 3, 32)]
)
def test_models_give_one_logit_a_class(name, channels, size):
    model = untrained(name, 7)
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)
    assert not model.training


def test_every_model_is_seeded_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    for name in MODELS:
        first, again, other = (untrained(name, 10, seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert any(not torch.equal(first[key], other[key]) for key in first)
    assert torch.equal(before, torch.get_rng_state())


def test_resnet20_has_the_published_size():
    parameters = sum(weight.numel() for weight in untrained("resnet20", 10).parameters())
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64  # instead of the paper's shortcuts without parameters
    assert parameters == 269_722 + projections


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_make_a_round_trip(tmp_path, suffix):
    state, path = untrained("resnet8", 10, seed=1).state_dict(), tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = untrained("resnet8", 10, seed=0)
    load_weights(model, path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Marker:
    """Restoring one would show that code of the file has run."""

    def __reduce__(self):
        return (pytest.fail, ("code of a weights file was run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"fc.weight": Marker()},
            "tensors only: it holds Python objects, none of which is made; save the state_dict alone$",
        ),
        (nn.Linear(2, 2), "tensors only: it holds Python objects, none of which is made; save the state_dict alone$"),
        ([torch.zeros(1)], "not a state_dict, that is names with tensors; it holds list"),
        ({"state_dict": {}, "epoch": 3}, "it holds a mapping with the keys state_dict, epoch"),
        ({"model": {"fc.weight": 3}}, "it holds a mapping with the keys model"),
        ({0: torch.zeros(1)}, "not a state_dict, that is names with tensors; it holds a mapping with the keys 0"),
        ({"model": {0: torch.zeros(1), "a": torch.zeros(1)}}, "it holds a mapping with the keys model"),
    ],
    ids=["code", "module", "list", "checkpoint", "nested", "numbers", "nested numbers"],
)
def test_files_with_more_than_tensors_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(BenchmarkError, match=message):
        load_weights(untrained("resnet8", 10), tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_files_that_are_no_weights_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(
        BenchmarkError,
        match=r"not a readable weights file .*: it is damaged, or neither safetensors nor written by torch.save$",
    ):
        load_weights(untrained("resnet8", 10), tmp_path / name)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state, other: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state, other: {"model": {f"module.{name}": value for name, value in state.items()}},
        lambda state, other: {"state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()}},
        lambda state, other: {"model": other, "model_ema": state},
        lambda state, other: {"state_dict": other, "state_dict_ema": state, "epoch": 3},
        lambda state, other: {
            "model": other,
            "model_ema": {"n_averaged": torch.tensor(5), **{f"module.{name}": value for name, value in state.items()}},
        },
    ],
    ids=["state_dict", "parallel", "compiled", "ema", "timm's ema", "torch's ema"],
)
def test_weights_are_found_in_checkpoints(tmp_path, wrap):
    state, other = (untrained("resnet8", 10, seed=seed).state_dict() for seed in (1, 2))
    torch.save(wrap(state, other), tmp_path / "checkpoint.pth")
    model = untrained("resnet8", 10, seed=0)
    load_weights(model, tmp_path / "checkpoint.pth")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("attribute", ["STATE", "path", "network", "Files.path"])
def test_weights_are_found_in_packages(tmp_path, monkeypatch, attribute):
    torch.save(untrained("resnet8", 10, seed=1).state_dict(), tmp_path / "weights.pt")
    (tmp_path / "some_weights.py").write_text(
        f"import torch\nfrom benchmarks.networks.weights_and_transforms import untrained\n"
        f"STATE = untrained('resnet8', 10, seed=1).state_dict()\n"
        f"def path():\n    return {str(tmp_path / 'weights.pt')!r}\n"
        f"def network():\n    return untrained('resnet8', 10, seed=1)\n"
        f"class Files:\n    path = {str(tmp_path / 'weights.pt')!r}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_weights", raising=False)
    model = untrained("resnet8", 10, seed=0)
    load_weights(model, Path(f"some_weights:{attribute}"))
    expected = untrained("resnet8", 10, seed=1).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_programs_and_files_that_cannot_be_read_are_told(tmp_path, monkeypatch):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "program.pt")
    with pytest.raises(BenchmarkError, match="tensors only: it is a TorchScript program; save the state_dict alone"):
        load_weights(untrained("resnet8", 10), tmp_path / "program.pt")

    def fail(*_, **__):
        raise PermissionError("not for you")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(BenchmarkError, match=r"program\.pt cannot be read: not for you"):
        load_weights(untrained("resnet8", 10), tmp_path / "program.pt")


def test_missing_weights_are_refused(tmp_path):
    with pytest.raises(BenchmarkError, match=r"no such weights file: .*none\.pt"):
        load_weights(untrained("resnet8", 10), tmp_path / "none.pt")


def test_keys_and_shapes_that_do_not_fit_are_named(tmp_path):
    model = untrained("resnet8", 10)
    state = model.state_dict()
    del state["bn1.bias"]
    state |= {"head.weight": torch.zeros(1), "fc.weight": torch.zeros(3, 64)}
    torch.save(state, tmp_path / "weights.pt")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(BenchmarkError) as error:
        load_weights(model, tmp_path / "weights.pt")
    message = str(error.value)
    assert "does not fit the CifarResNet" in message
    assert "missing: bn1.bias;" in message
    assert "unexpected: head.weight;" in message
    assert "wrong shape: fc.weight (3, 64) instead of (10, 64)" in message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_counters_that_only_training_uses_may_be_missing(tmp_path):
    state = untrained("resnet8", 10, seed=1).state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    torch.save(old, tmp_path / "weights.pt")
    model = untrained("resnet8", 10, seed=0)
    load_weights(model, tmp_path / "weights.pt")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_long_lists_of_keys_are_cut(tmp_path):
    torch.save(untrained("resnet20", 10).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(BenchmarkError, match=r"unexpected: (layer1\S+ ){3}and \d+ more"):
        load_weights(untrained("resnet8", 10, seed=0), tmp_path / "weights.pt")


def test_number_of_outputs_is_compared_with_the_classes():
    with pytest.raises(BenchmarkError, match="the model has 7 outputs, the data 2 classes"):
        check_outputs(untrained("resnet8", 7), torch.zeros(1, 1, 8, 8), ("a", "b"))
