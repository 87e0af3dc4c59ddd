"""Code of the README that can be run with a tiny model does run."""

import re
from pathlib import Path

import pytest
import torch

from cat_plugin import apply_cat
from tests.cat_plugin.helpers import images, model_pair

README = Path(__file__).resolve().parent.parent / "README.md"


def code_of(title):
    """The Python blocks under the heading."""
    section = re.split(r"^#+ ", README.read_text("utf-8").split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


def test_save_load_deploy(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    quantized_model, fp_model = (model.eval() for model in model_pair())
    cat_model = apply_cat(quantized_model, fp_model, images(400))
    fresh = images(37, seed=1)
    with torch.no_grad():
        expected = quantized_model(fresh)
    deploy, keep = code_of("Save, load, deploy")

    names = {"torch": torch, "images": images(4), "cat_model": cat_model, "quantized_model": quantized_model}
    exec(deploy, names)
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    (onnx,) = session.run(None, {"x": fresh.numpy()})
    for found in (names["baked"](fresh), names["program"].module()(fresh), torch.from_numpy(onnx)):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0.0)

    names["class_names"] = [f"class {index}" for index in range(10)]
    exec(keep.replace("...  #", "cat_model.remove()  #"), names)
    assert names["cat_model"].class_names[3] == "class 3"
    assert torch.equal(quantized_model(fresh), expected)
