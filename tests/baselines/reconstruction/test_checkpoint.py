import contextlib
import json

import pytest
import torch
from torch import nn

from baselines import quantize
from baselines.recipes import Recipe, Stage
from baselines.reconstruction import engine
from baselines.reconstruction.unit_run import UnitRun

from ..networks import SmallResNet, images, randomized, same

UNITS = 4
OPTIONS = {"w_bits": 2, "a_bits": 2, "iters": 3, "batch_size": 16, "seed": 5}


class Stopped(Exception):
    pass


def run(folder=None, **options):
    return quantize(randomized(SmallResNet()), images(40), checkpoint=folder, **OPTIONS | options)


def run_until(folder, monkeypatch, units, when, make=run, **options):
    """Run, and die before or within the work on the unit after so many."""
    seen, real = [], UnitRun.finish

    def finish(self, bar):
        seen.append(self.unit.name)
        if len(seen) <= units:
            return real(self, bar)
        if when == "within":
            next(self.steps(), None)
        raise Stopped

    with monkeypatch.context() as patch, contextlib.suppress(Stopped):
        patch.setattr(UnitRun, "finish", finish)
        make(folder, **options)


@pytest.fixture
def worked_on(monkeypatch):
    """The units that are reconstructed, with the number of the stage."""
    seen, real = [], UnitRun.finish

    def finish(self, bar):
        seen.append(self.unit.name)
        return real(self, bar)

    monkeypatch.setattr(UnitRun, "finish", finish)
    return seen


@pytest.fixture(scope="module")
def whole():
    """Uninterrupted runs, by method."""
    return {method: run(method=method) for method in ("qdrop", "brecq", "adaround", "pd_quant")}


@pytest.mark.parametrize("when", ["before", "within"])
@pytest.mark.parametrize(
    ("method", "units"),
    [*(("qdrop", n) for n in range(4)), *(("brecq", n) for n in (3, 4, 6)), ("adaround", 4), ("pd_quant", 2)],
)
def test_resumed_network_equals_the_uninterrupted_one(tmp_path, monkeypatch, whole, worked_on, method, units, when):
    folder = tmp_path / "checkpoint"
    run_until(folder, monkeypatch, units, when, method=method)
    worked_on.clear()
    assert same(run(folder, method=method), whole[method])
    assert len(worked_on) == {"adaround": 7, "brecq": 2 * UNITS}.get(method, UNITS) - units


class Fork(torch.nn.Module):
    """Two layers with a common activation quantizer, which both move."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (torch.nn.Conv2d(i, 4, 3) for i in (3, 4, 4))

    def forward(self, x):
        x = self.stem(x).relu()
        return self.a(x).relu() + self.b(x)


def test_quantizer_that_a_later_unit_moves_is_as_it_was_when_the_first_one_was_passed(tmp_path, monkeypatch):
    recipe = Recipe(unit="layer", stages=(Stage(rounding=True, activation_scales=True, scale_lr=1e-2),))
    monkeypatch.setattr("baselines.api.RECIPES", {"custom": recipe})
    model = randomized(torch.nn.Sequential(Fork(), torch.nn.Flatten(), torch.nn.Linear(64, 3)))

    def make(folder=None):
        options = OPTIONS | {"iters": 20, "blocks": ["0"]}
        return quantize(model, images(40), method="custom", checkpoint=folder, **options)

    whole = make()
    assert whole[0].a.input_quantizer is whole[0].b.input_quantizer
    run_until(tmp_path, monkeypatch, 3, "within", make)
    assert same(make(tmp_path), whole)


def test_stopped_again_and_again(tmp_path, monkeypatch, whole, worked_on):
    for _ in range(8):
        run_until(tmp_path / "new" / "folder", monkeypatch, 1, "within", method="brecq")
    worked_on.clear()
    assert same(run(tmp_path / "new" / "folder", method="brecq"), whole["brecq"])
    assert not worked_on


@pytest.mark.parametrize("method", ["qdrop", "brecq"])
def test_finished_network_comes_back_without_a_step_or_a_captured_input(tmp_path, monkeypatch, method, whole):
    run(tmp_path, method=method)
    monkeypatch.setattr(engine, "UnitRun", None)
    monkeypatch.setattr(engine, "Stream", None)
    assert same(run(tmp_path, method=method), whole[method])


def test_checkpoint_is_data_and_leaves_no_half_written_file(tmp_path):
    run(tmp_path, method="qdrop")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["run.json", *(f"stage1-unit000{index}.safetensors" for index in range(1, UNITS + 1))]
    assert json.loads((tmp_path / "run.json").read_text())["method"] == "qdrop"


def test_network_is_the_same_without_a_checkpoint(whole, tmp_path):
    assert same(run(tmp_path, method="qdrop"), whole["qdrop"])


def with_tanh(model):
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.ReLU))
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, nn.Tanh())
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "brecq"}, r"\(method: qdrop then, brecq now\)"),
        ({"error_weighting": "fisher"}, r"\(recipe: Recipe"),
        ({"w_bits": 3}, r"\(w_bits: 2 then, 3 now\)"),
        ({"a_bits": 4}, r"\(a_bits: 2 then, 4 now\)"),
        ({"seed": 6}, r"\(seed: 5 then, 6 now\)"),
        ({"iters": 4}, r"\(iters: 3 then, 4 now\)"),
        ({"iters": None}, r"\(iters: 3 then, None now\)"),
        ({"batch_size": 8}, r"\(batch_size: 16 then, 8 now\)"),
        ({"range_method": "minmax"}, r"\(range_method: mse then, minmax now\)"),
        ({"cache_dtype": torch.bfloat16}, r"\(cache_dtype: None then, torch\.bfloat16 now\)"),
        ({"blocks": ["layer1.0"]}, r"\(units: \['conv1', "),
        ({"images": images(40, seed=2)}, r"\(calibration images: \w{16} then, \w{16} now\)"),
        ({"model": randomized(SmallResNet(), seed=2)}, r"\(network weights: \w{16} then, \w{16} now\)"),
        ({"model": with_tanh(randomized(SmallResNet()))}, r"\(network modules: \w{16} then, \w{16} now\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_refused_and_told_apart(tmp_path, change, message):
    run(tmp_path, method="qdrop")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    options = {"method": "qdrop", **OPTIONS, **change}
    model, inputs = options.pop("model", randomized(SmallResNet())), options.pop("images", images(40))
    with pytest.raises(ValueError, match=rf"is of another run .*{message}") as error:
        quantize(model, inputs, checkpoint=tmp_path, **options)
    assert "delete it to start anew" in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_cache_device_may_change(tmp_path, whole):
    run(tmp_path, method="qdrop")
    assert same(run(tmp_path, method="qdrop", cache_device="cpu"), whole["qdrop"])


def test_folder_of_a_run_that_was_killed_while_it_was_described_is_taken(tmp_path, whole):
    (tmp_path / ".run.json.x1y2.part").write_text("{")
    assert same(run(tmp_path, method="qdrop"), whole["qdrop"])
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / ".stage1-unit0001.safetensors.x1y2.part").write_text("")
    with pytest.raises(ValueError, match="is no checkpoint and not empty"):
        run(tmp_path / "more")


class Extra(torch.nn.Module):
    """Keeps something else than tensors in its ``state_dict``, and a tensor beside it."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.body = randomized(SmallResNet())
        self.register_buffer("shift", torch.tensor(shift), persistent=False)

    def forward(self, x):
        return self.body(x) + self.shift

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        assert state == {"version": 3}


def test_state_that_is_no_tensor_is_no_obstacle_and_every_tensor_counts(tmp_path, worked_on):
    def make(model):
        model = torch.nn.Sequential(torch.nn.Identity(), model)
        return quantize(model, images(40), checkpoint=tmp_path, blocks=["1"], **OPTIONS)

    first = make(Extra())
    assert worked_on == ["1"]
    assert torch.equal(make(Extra())(images(3)), first(images(3)))
    assert worked_on == ["1"]
    with pytest.raises(ValueError, match="network weights: "):
        make(Extra(shift=1.0))


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no checkpoint and not empty"):
        run(tmp_path)
    with pytest.raises(ValueError, match="is no checkpoint and not empty"):
        run(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["run.json", "stage1-unit0002.safetensors"])
def test_damaged_file_is_a_clear_error(tmp_path, name):
    run(tmp_path)
    (tmp_path / name).write_bytes(b"{")
    with pytest.raises(ValueError, match=rf"{name} (cannot be read|is damaged)"):
        run(tmp_path)
