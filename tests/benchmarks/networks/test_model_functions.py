"""Networks that functions of the user's make."""

import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks import BenchmarkError
from benchmarks.networks.model_functions import load_from_function

CODE = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 5)
    def forward(self, images):
        return self.fc(images.mean((2, 3)))

def alone():
    return Tiny()

def prepare(image):
    return torch.full((3, 8, 8), float(image.size[0]))

def pair():
    return Tiny(), prepare

def configured():
    model = Tiny()
    model.default_cfg = {"input_size": (3, 40, 40), "mean": (0.0, 0.0, 0.0), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0,
                         "interpolation": "bilinear"}
    return model

def text():
    return "resnet18"

def broken():
    raise OSError("no file\\nat all")

number = 3
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "tiny_networks", raising=False)
    path = tmp_path / "tiny_networks.py"
    path.write_text(CODE)
    yield path
    sys.modules.pop("tiny_networks", None)


def test_function_gives_network_and_transform(script):
    before = torch.get_rng_state()
    found, again = (load_from_function(f"{script}:pair", None) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found.model.fc.weight, again.model.fc.weight) and not found.model.training
    assert found.transform(Image.new("RGB", (7, 9)))[0, 0, 0] == 7
    assert (found.source, found.published) == ("those of pair in tiny_networks.py", None)


def test_module_in_the_current_directory_is_found(script, monkeypatch):
    monkeypatch.chdir(script.parent)
    assert type(load_from_function("tiny_networks:alone", None).model).__name__ == "Tiny"


def test_transform_is_that_of_the_networks_own_configuration(script):
    pytest.importorskip("timm")
    found = load_from_function(f"{script}:configured", None).transform(Image.new("RGB", (80, 60), "white"))
    torch.testing.assert_close(found, torch.full((3, 40, 40), 2.0))


def test_usual_transform_is_taken_where_there_is_none_and_the_log_says_so(script, caplog):
    found = load_from_function(f"{script}:alone", None)
    assert (found.transform.resize_size, found.transform.crop_size) == ([256], [224])
    assert "returns no transform: images are resized to 256, cut to 224" in caplog.text


def test_code_changes_with_the_file_and_the_network(script):
    codes = {load_from_function(f"{script}:{name}", None).code for name in ("pair", "pair")}
    assert len(codes) == 1
    script.write_text(CODE.replace("images.mean", "2 * images.mean"))
    sys.modules.pop("tiny_networks")
    assert load_from_function(f"{script}:pair", None).code not in codes


@pytest.mark.parametrize("changed", ["tiny_layers", "tiny_bases"])
def test_code_changes_with_the_files_of_layers_and_what_they_inherit(script, monkeypatch, changed):
    files = {
        "tiny_bases": "from torch import nn\n\nclass Base(nn.Linear):\n    pass\n",
        "tiny_layers": "from tiny_bases import Base\n\nclass Layer(Base):\n    pass\n",
        "tiny_networks": "from torch import nn\nfrom tiny_layers import Layer\n\n"
        "def stacked():\n    return nn.Sequential(nn.Flatten(), Layer(3, 5))\n",
    }
    codes = []
    for text in ("", "", "number = 3\n"):
        for name, code in files.items():
            monkeypatch.delitem(sys.modules, name, raising=False)
            (script.parent / f"{name}.py").write_text(code + (text if name == changed else ""))
        codes.append(load_from_function(f"{script}:stacked", None).code)
    assert codes[0] == codes[1] != codes[2]


def test_network_of_a_class_without_a_file_has_a_code(script):
    script.write_text(CODE + "\ndef made():\n    return type('Made', (Tiny,), {'__module__': 'nowhere'})()\n")
    assert load_from_function(f"{script}:made", None).code


def test_weights_replace_those_of_the_function(script, tmp_path):
    state = {"fc.weight": torch.ones(5, 3), "fc.bias": torch.zeros(5)}
    save_file(state, tmp_path / "weights.safetensors")
    found = load_from_function(f"{script}:pair", tmp_path / "weights.safetensors")
    assert torch.equal(found.model.fc.weight, state["fc.weight"])
    save_file(nn.Linear(4, 5).state_dict(), tmp_path / "others.safetensors")
    with pytest.raises(
        BenchmarkError, match=r"does not fit the Tiny; missing: fc\.weight, fc\.bias; unexpected: bias, w"
    ):
        load_from_function(f"{script}:pair", tmp_path / "others.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"expected package\.module:name or path/to/file\.py:name"),
        ("none.py:pair", r"--model-fn: no such file: none\.py"),
        ("no_module_here:pair", r"no_module_here cannot be imported: ModuleNotFoundError: No module named 'no_mod"),
        ("{}:lite1", r"has no lite1; it has .*pair"),
        ("{}:number", r"is of type int; expected a function"),
        ("{}:broken", r"broken failed: OSError: no file$"),
        ("{}:text", r"returned str; expected a torch\.nn\.Module, or a pair"),
    ],
)
def test_what_is_no_such_function_is_refused(script, text, message):
    with pytest.raises(BenchmarkError, match=message):
        load_from_function(text.format(script), None)


def test_file_that_is_called_like_a_known_module_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "torch.py").write_text(CODE)
    with pytest.raises(BenchmarkError, match=r"another module is called torch like .*; rename the file"):
        load_from_function(f"{tmp_path / 'torch.py'}:pair", None)
