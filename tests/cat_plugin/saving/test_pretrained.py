import hashlib
import json
import logging
import os
import pickle
import stat

import pytest
import safetensors.torch
import torch
from torch import nn

import cat_plugin
from cat_plugin import CATConfig, CATError, CATWrapper, ChannelAffine, ClusterAffine, apply_cat
from cat_plugin.saving.pretrained import CONFIG_NAME, FORMAT_VERSION, TENSORS_NAME
from tests.cat_plugin.helpers import SmallNet, images, model_pair, state_of
from tests.cat_plugin.layers.networks import pictures, planted

FILES = {CONFIG_NAME, TENSORS_NAME}


def fit(config=None, labels=False):
    quantized, fp = (model.eval() for model in model_pair())
    x = images(400)
    eval_loader = [(x, fp(x).argmax(dim=1))] if labels else None
    return apply_cat(quantized, fp, x, config=config, eval_loader=eval_loader)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder, and the wrapper that was saved there."""
    folder, cat_model = tmp_path_factory.mktemp("saved"), fit()
    cat_model.save_pretrained(folder)
    return folder, cat_model


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the folder to damage."""
    for name in FILES:
        (tmp_path / name).write_bytes((saved[0] / name).read_bytes())
    return tmp_path


def all_buffers(cat_model):
    """Buffers of both levels, by their names in the file."""
    buffers = dict(cat_model.correction.named_buffers())
    for name, part in cat_model.layers.items():
        buffers |= {f"layers.{name}.{key}": buffer for key, buffer in part.named_buffers()}
    return buffers


def fresh_model():
    return model_pair()[0].eval()


CONFIGS = {"auto": None, "paper": CATConfig.paper(5), "clusters": CATConfig(num_clusters=6, seed=3)}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_is_exact(config, tmp_path):
    cat_model = fit(config, labels=True)
    target = tmp_path / "new" / "folder"
    cat_model.save_pretrained(str(target))
    assert {path.name for path in target.iterdir()} == FILES
    model = fresh_model()
    loaded = CATWrapper.from_pretrained(target, model)
    x = images(50, seed=1)
    assert loaded.attached and loaded.quantized_model is model
    assert torch.equal(model(x), cat_model.quantized_model(x))
    assert torch.equal(loaded.bake()(x), model(x))
    assert (loaded.config, loaded.report) == (cat_model.config, cat_model.report)
    assert loaded.report.accuracy.paired.images == 400
    assert str(loaded.report) == str(cat_model.report)
    theirs = all_buffers(cat_model)
    assert {name: (b.dtype, b.shape) for name, b in all_buffers(loaded).items()} == {
        name: (b.dtype, b.shape) for name, b in theirs.items()
    }


def test_what_is_written_can_be_read_by_others(saved):
    folder, cat_model = saved
    values = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    assert (values["format_version"], values["library_version"]) == (FORMAT_VERSION, cat_plugin.__version__)
    assert values["config"] == cat_model.config.to_dict()
    assert values["report"] == cat_model.report.to_dict()
    assert values["report"]["evidence"]["candidates"]
    assert values["tensors_sha256"] == hashlib.sha256((folder / TENSORS_NAME).read_bytes()).hexdigest()
    tensors = safetensors.torch.load_file(folder / TENSORS_NAME)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        name: buffer.tolist() for name, buffer in all_buffers(cat_model).items()
    }
    assert values["layers"] == [
        {"name": name, "axis": part.axis, "channels": len(part.scale)} for name, part in cat_model.layers.items()
    ]


def test_saving_and_loading_leave_the_model_as_it_was(tmp_path):
    cat_model = fit()
    before = state_of(cat_model.quantized_model)
    cat_model.save_pretrained(tmp_path)
    assert state_of(cat_model.quantized_model) == before
    model = fresh_model()
    before = state_of(model)
    CATWrapper.from_pretrained(tmp_path, model).remove()
    assert state_of(model) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_types_are_kept(dtype, tmp_path):
    parts = {"weight": (10, 3), "bias": (3,), "scale": (3, 10), "shift": (3, 10)}
    correction = ClusterAffine(**{name: torch.randn(shape).to(dtype) for name, shape in parts.items()})
    correction.bias[1] = -torch.inf  # a cluster without images
    CATWrapper(fresh_model(), correction).save_pretrained(tmp_path)
    loaded = CATWrapper.from_pretrained(tmp_path, fresh_model())
    assert (loaded.config, loaded.report) == (None, None)
    for name, buffer in correction.named_buffers():
        assert torch.equal(getattr(loaded.correction, name), buffer) and buffer.dtype == dtype


def test_class_names(tmp_path, saved):
    names = [f"klasse {index} ä" for index in range(10)]
    cat_model = saved[1]
    cat_model.save_pretrained(tmp_path, class_names=names)
    loaded = CATWrapper.from_pretrained(tmp_path, fresh_model())
    assert loaded.class_names == tuple(names)
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text("utf-8"))["class_names"] == names
    for wrong, message in [
        (names[:9], "class_names are 9; expected a list of 10 texts"),
        ("abcdefghij", "class_names is a str"),
        ([*names[:9], 9], "class_names hold 9"),
        ({*names}, "class_names is a set"),
    ]:
        with pytest.raises(CATError, match=message):
            cat_model.save_pretrained(tmp_path / "not", class_names=wrong)
    assert not (tmp_path / "not").exists()


class Pair(SmallNet):
    def forward(self, x):
        return {"aux": super().forward(x) * 0, "out": super().forward(x)}


def test_output_is_kept_unless_it_is_functions(tmp_path):
    correction = fit().correction
    CATWrapper(Pair().eval(), correction, output="out").save_pretrained(tmp_path)
    plain, loaded = Pair().eval(), CATWrapper.from_pretrained(tmp_path, Pair().eval())
    expected = correction(plain(images())["out"])
    assert loaded.output == "out"
    assert torch.equal(loaded(images())["out"], expected)
    functions = (lambda output: output["out"], lambda output, logits: {**output, "out": logits})
    CATWrapper(plain, correction, output=functions).save_pretrained(tmp_path)
    with pytest.raises(CATError, match=r"saved with output=\(get, set\), functions, .* give them again"):
        CATWrapper.from_pretrained(tmp_path, Pair().eval())
    for output in (functions, "out"):
        loaded = CATWrapper.from_pretrained(tmp_path, Pair().eval(), output=output)
        assert torch.equal(loaded(images())["out"], expected)


def change(model, what):
    with torch.no_grad():
        if what == "value":
            model.last.weight[3, 4] += 1e-3
        elif what == "buffer":
            model.norm.running_mean[2] += 1e-3
        elif what == "type":
            model.half()
        elif what == "name":
            model.renamed = model._modules.pop("last")
        else:
            model.last = nn.Linear(16, 11)
    return model


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("value", "its weights or buffers have other values"),
        ("buffer", "its weights or buffers have other values"),
        ("type", "they have other names, shapes or types"),
        ("name", "they have other names, shapes or types"),
        ("shape", "it had 9 tensors of 347 numbers and now has 9 of 364"),
    ],
)
def test_another_model_is_refused_unless_asked_for(saved, what, message, caplog):
    folder, _ = saved
    model = change(fresh_model(), what)
    before = state_of(model)
    with pytest.raises(CATError, match=rf"holds a correction for another quantized model .*{message}.* strict=False"):
        CATWrapper.from_pretrained(folder, model)
    assert state_of(model) == before and not caplog.records
    with caplog.at_level(logging.WARNING):
        loaded = CATWrapper.from_pretrained(folder, model, strict=False)
    assert loaded.attached and message in caplog.text


def test_nothing_is_warned_of_for_the_same_model(saved, caplog):
    CATWrapper.from_pretrained(saved[0], fresh_model())
    CATWrapper.from_pretrained(saved[0], nn.Sequential(fresh_model())[0].train(), strict=False)
    assert not caplog.records


def test_attached_model_is_refused(saved):
    folder, cat_model = saved
    with pytest.raises(CATError, match="already attached to this SmallNet"):
        CATWrapper.from_pretrained(folder, cat_model.quantized_model)


def test_wrapped_models_are_unwrapped(saved):
    class Simulation:
        model = fresh_model()

    assert CATWrapper.from_pretrained(saved[0], Simulation()).quantized_model is Simulation.model


def test_paths_that_are_no_saved_correction(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, message in [
        ("google/vit-base-patch16-224", "does not exist; expected a local folder .*nothing is downloaded"),
        (tmp_path / "absent", "absent does not exist"),
        (tmp_path / "file", "is a file; expected the folder"),
        (tmp_path, f"{CONFIG_NAME} cannot be read .No such file"),
        (None, "None is a NoneType; expected the path of a local folder"),
    ]:
        with pytest.raises(CATError, match=message):
            CATWrapper.from_pretrained(path, fresh_model())
    with pytest.raises(CATError, match="file is a file; expected a folder to write"):
        fit().save_pretrained(tmp_path / "file")


def refused(folder, message):
    """The error that loading gives, once for strict=True and once for False; nothing stays attached."""
    for strict in (True, False):
        model = fresh_model()
        before = state_of(model)
        with pytest.raises(CATError, match=message):
            CATWrapper.from_pretrained(folder, model, strict=strict)
        assert state_of(model) == before


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, rf"{name} cannot be read \(No such file or directory\); save_pretrained writes it")
    (folder / name).mkdir()
    refused(folder, rf"{name} cannot be read \(Is a directory\)")


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", sorted(FILES))
def test_truncated_file(folder, name, share):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(share * len(data))])
    refused(folder, "is no JSON text" if name == CONFIG_NAME else "is not the file .* cut off, changed, or of another")


def test_every_flipped_byte_of_the_tensors_is_found(folder):
    data = (folder / TENSORS_NAME).read_bytes()
    for position in range(0, len(data), 97):
        changed = bytearray(data)
        changed[position] ^= 1
        (folder / TENSORS_NAME).write_bytes(bytes(changed))
        with pytest.raises(CATError, match="is not the file"):
            CATWrapper.from_pretrained(folder, nn.Linear(1, 1))


def test_files_of_two_corrections(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    fit(CATConfig.paper(3)).save_pretrained(other)
    (folder / TENSORS_NAME).write_bytes((other / TENSORS_NAME).read_bytes())
    refused(folder, "is not the file that cat_config.json was saved with")


def resign(folder, data):
    """Writes tensors together with the digest that fits them, as someone who tampers would."""
    (folder / TENSORS_NAME).write_bytes(data)
    values = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    values["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    (folder / CONFIG_NAME).write_text(json.dumps(values))


class Bomb:
    def __reduce__(self):
        return os._exit, (1,)


def tampered(tensors, what):
    scale = tensors["scale"]
    changes = {
        "missing": {"bias": None},
        "unknown": {"extra": torch.ones(2)},
        "shape": {"shift": torch.ones(2, 3)},
        "classes": {"scale": torch.ones(0, 10), "shift": torch.ones(0, 10)},
        "dimensions": {"scale": torch.ones(())},
        "integers": {"scale": scale.to(torch.int64)},
        "nan": {"scale": scale * torch.nan},
        "inf": {"shift": scale * torch.inf},
        "bias": {"bias": tensors["bias"] + torch.inf},
        "no cluster": {"bias": tensors["bias"] - torch.inf},
    }
    return {name: tensor for name, tensor in {**tensors, **changes[what]}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"tensors \['mix', .*expected weight, bias, scale, shift, and some of \('project'"),
        ("unknown", r"tensors \['bias', 'extra'"),
        ("shape", r"shift \(2, 3\).*; expected weight \(C, K\)"),
        ("classes", r"scale \(0, 10\).*; expected weight"),
        ("dimensions", r"scale \(\)"),
        ("integers", "scale is torch.int64; expected one of torch.float64"),
        ("nan", r"scale has \d+ values that are not finite"),
        ("inf", r"shift has \d+ values that are not finite"),
        ("bias", r"bias has \d+ values that are not finite"),
        ("no cluster", "bias has no finite value"),
    ],
)
def test_tampered_tensors(folder, what, message):
    tensors = safetensors.torch.load_file(folder / TENSORS_NAME)
    resign(folder, safetensors.torch.save(tampered(tensors, what)))
    refused(folder, rf"{TENSORS_NAME} holds no correction \(.*{message}")


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, pickle.dumps(Bomb()), b"\x08" + b"\0" * 7 + b"{}      " * 2])
def test_files_that_are_no_tensors_are_not_run(folder, data):
    resign(folder, data)
    refused(folder, rf"{TENSORS_NAME} holds no correction")


def test_saved_by_pytorch_is_not_run(folder):
    torch.save(Bomb(), folder / TENSORS_NAME)
    resign(folder, (folder / TENSORS_NAME).read_bytes())
    refused(folder, rf"{TENSORS_NAME} holds no correction")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON text"),
        ("{", "is no JSON text"),
        ("\udcff", "is no JSON text"),
        ("[" * 100_000, "is no JSON text"),
        ("9" * 5000, "is no JSON text"),
        ("[]", "does not say its format_version"),
        ("null", "does not say its format_version"),
        ("3", "does not say its format_version"),
        ('"format_version"', "does not say its format_version"),
        ("{}", "does not say its format_version"),
        ('{"format_version": "1"}', "does not say its format_version"),
        ('{"format_version": true}', "does not say its format_version"),
        ('{"format_version": 1, "library_version": "0.9"}', "is of format 1, written by cat-plugin 0.9; .* format 2"),
        ('{"format_version": 2}', r"lacks \['fingerprint', 'library_version', 'tensors_sha256'\]"),
    ],
)
def test_texts_that_are_no_config(folder, text, message):
    (folder / CONFIG_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, rf"{CONFIG_NAME} .*{message}|{CONFIG_NAME}: .*{message}")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["tensors_sha256"], 3, r"the file.tensors_sha256 is 3; expected str"),
        (["extra"], 3, r"the file has unknown fields \['extra'\]"),
        (["fingerprint"], [], r"the file.fingerprint is \[\]; expected the fields of a Fingerprint"),
        (["fingerprint", "tensors"], None, "the file.fingerprint.tensors is None; expected int"),
        (["config"], "paper", "the file.config is 'paper'; expected .*CATConfig"),
        (["config", "alpha"], 7, "alpha=7.0 should be a number from 0"),
        (["config", "mode"], "exec", "mode='exec' should be one of"),
        (["config", "seed"], True, "the file.config.seed is True; expected int"),
        (["report"], [1], r"the file.report is \[1\]; expected"),
        (["report", "images"], "many", "the file.report.images is 'many'; expected int"),
        (["report", "cluster_sizes"], 5, "the file.report.cluster_sizes is 5; expected tuple"),
        (["report", "cluster_sizes"], [5, "x"], r"the file.report.cluster_sizes\[1\] is 'x'; expected int"),
        (["report", "fit_seconds"], 10**400, "too large"),
        (["report", "evidence", "candidates"], [{}], r"candidates\[0\] has unknown fields \[\] and lacks \['kl_gain'"),
        (["report", "held_out"], "x" * 100, r"the file.report.held_out is 'x{40,}\.\.\.; expected"),
        (["class_names"], ["a"], "class_names are 1; expected a list of 10 texts"),
        (["layers"], {}, "the file.layers is {}; expected tuple"),
        (["output"], 1.5, "the file.output is 1.5; expected"),
        (["output"], "\0", None),
    ],
    ids=str,
)
def test_tampered_config(folder, path, value, message):
    values = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / CONFIG_NAME).write_text(json.dumps(values))
    if message is None:
        CATWrapper.from_pretrained(folder, fresh_model())
    else:
        refused(folder, rf"{CONFIG_NAME}: .*{message}")


@pytest.mark.parametrize("fails", sorted(FILES))
def test_interrupted_saving_leaves_the_old_files(folder, saved, monkeypatch, fails):
    before = {name: (folder / name).read_bytes() for name in FILES}
    write = type(folder).write_bytes

    def full(self, data):
        if fails in self.name:
            write(self, data[:10])
            raise OSError(28, "No space left on device")
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            fit(CATConfig.paper(3)).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    CATWrapper.from_pretrained(folder, fresh_model())


def test_files_have_the_usual_permissions(tmp_path, saved):
    saved[1].save_pretrained(tmp_path)
    (tmp_path / "other").write_text("x")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_saving_again_replaces(tmp_path, saved):
    fit(CATConfig.paper(3)).save_pretrained(tmp_path)
    saved[1].save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert CATWrapper.from_pretrained(tmp_path, fresh_model()).report == saved[1].report


def with_layers():
    """A wrapper with corrections of two layers that differ in every number."""
    parts = {"first": 16, "last": 10}
    layers = {name: ChannelAffine(1 + torch.rand(size), torch.rand(size), -1) for name, size in parts.items()}
    return CATWrapper(fresh_model(), ClusterAffine.identity(10), layers=layers)


def test_fitted_layers_come_back_as_they_were(tmp_path):
    cat_model = apply_cat(*planted(), pictures(96), config=CATConfig(layers="all"))
    assert cat_model.layers
    cat_model.save_pretrained(tmp_path)
    loaded = CATWrapper.from_pretrained(tmp_path, planted()[0])
    x = pictures(16, seed=1)
    assert torch.equal(loaded(x), cat_model(x)) and torch.equal(loaded.bake()(x), cat_model(x))
    assert loaded.report == cat_model.report


def test_layers_come_back_as_they_were(tmp_path):
    cat_model = with_layers()
    cat_model.save_pretrained(tmp_path)
    loaded = CATWrapper.from_pretrained(tmp_path, fresh_model())
    assert torch.equal(loaded(images()), cat_model(images()))
    assert not torch.equal(loaded(images()), fresh_model()(images()))
    model = loaded.remove()
    assert torch.equal(model(images()), fresh_model()(images()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_types_of_layers_are_kept(dtype, tmp_path):
    change = ChannelAffine(torch.rand(16).to(dtype), torch.rand(16).to(dtype), -1)
    CATWrapper(fresh_model(), ClusterAffine.identity(10), layers={"first": change}).save_pretrained(tmp_path)
    loaded = CATWrapper.from_pretrained(tmp_path, fresh_model()).layers["first"]
    assert loaded.scale.dtype == dtype and torch.equal(loaded.scale, change.scale)
    assert torch.equal(loaded.shift, change.shift)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.last.shift": None}, "lacks layers.last.scale or layers.last.shift, of a layer that"),
        ({"layers.other.scale": torch.ones(3)}, r"has the tensors .*'layers.other.scale'"),
        ({"layers.last.shift": torch.ones(9)}, r"scale \(10,\), shift \(9,\) and axis -1; expected"),
        ({"layers.last.scale": torch.ones(10, 1), "layers.last.shift": torch.ones(10, 1)}, r"got scale \(10, 1\)"),
        (
            {"layers.last.scale": torch.ones(9), "layers.last.shift": torch.ones(9)},
            "layer 'last' has 9 channels; cat_config.json has 10",
        ),
        ({"layers.last.scale": torch.full((10,), torch.nan)}, "layers.last.scale has 10 values that are not finite"),
        ({"layers.last.shift": torch.full((10,), -torch.inf)}, "layers.last.shift has 10 values that are not finite"),
        ({"layers.last.scale": torch.ones(10, dtype=torch.int64)}, "layers.last.scale is torch.int64; expected one of"),
    ],
    ids=["missing", "unknown", "shapes", "axes", "channels", "nan", "inf", "integers"],
)
def test_tampered_tensors_of_layers(tmp_path, changes, message):
    with_layers().save_pretrained(tmp_path)
    tensors = {**safetensors.torch.load_file(tmp_path / TENSORS_NAME), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    resign(tmp_path, safetensors.torch.save(kept))
    refused(tmp_path, rf"{TENSORS_NAME} holds no correction \(.*{message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "second"}, "lacks layers.second.scale or layers.second.shift"),
        ({"channels": 11}, "layer 'first' has 16 channels; cat_config.json has 11"),
        ({"axis": 0}, "axis 0; expected"),
        ({"axis": "last"}, r"the file.layers\[0\].axis is 'last'; expected int"),
        ({"name": 3}, r"the file.layers\[0\].name is 3; expected str"),
    ],
    ids=["name", "channels", "axis", "type of axis", "type of name"],
)
def test_tampered_layers(tmp_path, changes, message):
    with_layers().save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG_NAME).read_text("utf-8"))
    values["layers"][0] |= changes
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    refused(tmp_path, message)


def test_a_layer_that_the_model_does_not_have(tmp_path):
    with_layers().save_pretrained(tmp_path)
    model = change(fresh_model(), "name")
    before = state_of(model)
    with pytest.raises(CATError, match="holds a correction for another quantized model"):
        CATWrapper.from_pretrained(tmp_path, model)
    with pytest.raises(CATError, match="'last' is no layer of SmallNet; its children are first, norm, drop, renamed"):
        CATWrapper.from_pretrained(tmp_path, model, strict=False)
    assert state_of(model) == before
