"""Models inside of torch's containers, in TorchScript, and a fit inside of inference mode."""

import copy
import json

import pytest
import torch
from torch import nn

from cat_plugin import CATConfig, CATError, CATWrapper, ChannelAffine, ClusterAffine, apply_cat, fit_cluster_affine
from cat_plugin.saving.fingerprint import Fingerprint
from cat_plugin.saving.pretrained import CONFIG_NAME
from tests.cat_plugin.helpers import images, model_pair, paired_logits
from tests.cat_plugin.layers.networks import pictures, planted


def pair():
    return tuple(model.eval() for model in model_pair())


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model.first = compiled(model.first)
    return model


CONTAINERS = {
    "none": lambda model: model,
    "data-parallel": nn.DataParallel,
    "compiled": compiled,
    "compiled-data-parallel": lambda model: compiled(nn.DataParallel(model)),
    "compiled-inside": compiled_inside,
}


@pytest.mark.parametrize(
    ("then", "now", "layer"),
    [
        *(("none", now, None) for now in CONTAINERS),
        *((then, "none", None) for then in ("data-parallel", "compiled")),
        ("compiled", "data-parallel", None),
        ("none", "data-parallel", "first"),
        ("data-parallel", "none", "first"),
        ("none", "compiled-inside", "first"),
    ],
)
def test_the_same_model_is_known_in_every_container(then, now, layer, tmp_path):
    quantized, fp = pair()
    cat_model = apply_cat(quantized, fp, images(400), config=CATConfig(layers="none"))
    cat_model.remove()
    saved_from = CONTAINERS[then](quantized)
    prefix = {"data-parallel": "module.", "compiled": "_orig_mod."}.get(then, "")
    layers = {prefix + layer: ChannelAffine(torch.linspace(0.5, 1.5, 16), torch.ones(16), -1)} if layer else {}
    wrapper = CATWrapper(saved_from, cat_model.correction, layers=layers)
    expected = wrapper(images(50, seed=1))
    wrapper.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / CONFIG_NAME).read_text("utf-8"))["layers"]
    assert saved == ([{"name": "first", "axis": -1, "channels": 16}] if layer else [])
    loaded = CATWrapper.from_pretrained(tmp_path, CONTAINERS[now](pair()[0]))
    torch.testing.assert_close(loaded(images(50, seed=1)), expected, rtol=0, atol=0)
    assert not torch.equal(expected, pair()[0](images(50, seed=1)))


@pytest.mark.parametrize(
    ("contain", "layer"), [(compiled, "_orig_mod.first"), (lambda m: nn.Sequential(compiled(m)), "0._orig_mod.first")]
)
def test_layers_inside_of_what_is_compiled_are_refused(contain, layer, tmp_path):
    """A hook there is passed over where the compiler does not look for it again."""
    quantized, fp = pair()
    change = ChannelAffine(torch.ones(16), torch.ones(16), -1)
    message = r"inside of a compiled .*, where hooks need not run; give the model that was"
    with pytest.raises(CATError, match=message):
        CATWrapper(contain(quantized), ClusterAffine.identity(10), layers={layer: change})
    with pytest.raises(CATError, match=message):
        apply_cat(contain(quantized), fp, images(400), config=CATConfig(layers=(layer,)))
    CATWrapper(quantized, ClusterAffine.identity(10), layers={"first": change}).save_pretrained(tmp_path)
    with pytest.raises(CATError, match="inside of a compiled OptimizedModule"):
        CATWrapper.from_pretrained(tmp_path, compiled(pair()[0]))


@pytest.mark.parametrize("contain", [compiled, lambda m: nn.Sequential(compiled(m))], ids=["outside", "inside"])
def test_layers_inside_of_what_is_compiled_are_left_alone(contain):
    quantized, fp = pair()
    cat_model = apply_cat(contain(quantized), fp, images(400), config=CATConfig(layers="all"))
    assert cat_model.layers == {}
    assert cat_model.report.layers.reason == "no layer with weights that takes a hook is in the model"


def test_layers_of_data_parallel_models_are_those_of_the_model():
    expected = apply_cat(*planted(), pictures(96))
    quantized, fp = planted()
    cat_model = apply_cat(nn.DataParallel(quantized), fp, pictures(96))
    assert expected.layers and list(cat_model.layers) == [f"module.{name}" for name in expected.layers]
    assert torch.equal(cat_model(pictures(9)), expected(pictures(9)))


def test_another_model_in_a_container_is_still_refused(tmp_path):
    quantized, fp = pair()
    apply_cat(quantized, fp, images(400)).save_pretrained(tmp_path)
    with pytest.raises(CATError, match="another quantized model"):
        CATWrapper.from_pretrained(tmp_path, nn.DataParallel(pair()[1]))
    assert Fingerprint.of(nn.Sequential(quantized)) != Fingerprint.of(quantized)  # which is no container of torch's


def frozen(model):
    return torch.jit.freeze(torch.jit.script(model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [frozen, torch.jit.script], ids=["frozen", "scripted"])
def test_full_precision_models_may_be_scripts(make):
    quantized, fp = pair()
    labelled = [(images(100), fp(images(100)).argmax(1))]
    expected = apply_cat(copy.deepcopy(quantized), fp, images(400), eval_loader=labelled)
    cat_model = apply_cat(quantized, make(fp), images(400), eval_loader=labelled)
    torch.testing.assert_close(cat_model(images()), expected(images()), rtol=1e-3, atol=1e-3)  # freezing rounds
    assert cat_model.report.accuracy.paired.images == 100
    assert cat_model.report.warnings == expected.report.warnings


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [frozen, torch.jit.script], ids=["frozen", "scripted"])
def test_quantized_scripts_are_a_clear_error_whose_advice_holds(make, tmp_path):
    quantized, fp = pair()
    torch.jit.save(make(quantized), tmp_path / "quantized.pt")
    loaded = torch.jit.load(tmp_path / "quantized.pt")
    with pytest.raises(CATError, match=r"takes no hooks; give it inside .* torch.nn.Sequential\(model\)"):
        apply_cat(loaded, fp, images(400))
    cat_model = apply_cat(nn.Sequential(loaded), fp, images(400))
    assert cat_model.report.layers.reason == "no layer with weights that takes a hook is in the model"
    expected = apply_cat(quantized, fp, images(400), config=CATConfig(layers="none"))(images())
    torch.testing.assert_close(cat_model(images()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_gradients_go_through_what_was_fitted_in_inference_mode():
    quantized, fp = pair()
    expected = apply_cat(copy.deepcopy(quantized), fp, images(400))
    with torch.inference_mode():
        cat_model = apply_cat(quantized, fp, images(400))
        assert torch.equal(cat_model(images()), expected(images()))
    x = images().requires_grad_()
    quantized(x).sum().backward()
    assert x.grad.abs().sum() > 0
    cat_model.bake()(x).sum().backward()


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.double, lambda module: module.to(torch.float64)])
def test_buffers_made_or_moved_in_inference_mode_take_part_in_gradients(move):
    q, f = paired_logits(300, 5)
    with torch.inference_mode():
        correction = move(fit_cluster_affine(q.clone(), f.clone()))
    assert not any(buffer.is_inference() for buffer in correction.buffers())
    q.requires_grad_()
    correction(q).sum().backward()
    assert q.grad is not None
