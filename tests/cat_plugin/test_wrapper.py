import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from cat_plugin import CATError, CATWrapper, ChannelAffine, ClusterAffine, apply_cat
from tests.cat_plugin.helpers import SmallNet, copied, images, model_pair, state_of


def _correction(classes=10, clusters=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(classes, clusters), (clusters,), (clusters, classes), (clusters, classes)]
    return ClusterAffine(*(torch.randn(shape, generator=generator) for shape in shapes))


@pytest.fixture
def model():
    return SmallNet().eval()


def test_both_ways_of_calling_are_corrected_once(model):
    x = images()
    plain, correction = model(x), _correction()
    cat_model = CATWrapper(model, correction)
    assert torch.equal(model(x), correction(plain))
    assert torch.equal(cat_model(x), correction(plain))
    assert torch.equal(model.forward(x), plain)


def test_remove_restores_bit_for_bit(model):
    x = images()
    plain, before = model(x), state_of(model)
    cat_model = CATWrapper(model, _correction())
    assert cat_model.attached
    assert cat_model.remove() is model
    assert cat_model.remove() is model
    assert not cat_model.attached
    assert torch.equal(model(x), plain)
    assert torch.equal(cat_model(x), plain)
    assert state_of(model) == before


def test_state_dict_of_the_model_is_unchanged(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    CATWrapper(model, _correction())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_passes_the_hook_by(model):
    """As cat_plugin/README.md says, and that `bake()` is the answer."""
    x = images()
    plain, cat_model = model(x), CATWrapper(model, _correction())
    corrected, baked = model(x), cat_model.bake()
    fresh = SmallNet(seed=1).eval()
    fresh.load_state_dict(model.state_dict())
    for passed_by in (model.forward, torch.fx.symbolic_trace(model), fresh):
        assert torch.equal(passed_by(x), plain)
    assert not torch.equal(plain, corrected)
    assert torch.equal(baked.forward(x), corrected)


def test_disabled_nests_and_survives_errors(model):
    x = images()
    plain, cat_model = model(x), CATWrapper(model, _correction())
    corrected = model(x)
    assert not torch.equal(plain, corrected)
    with cat_model.disabled():
        assert torch.equal(model(x), plain)
        with pytest.raises(KeyError), cat_model.disabled():
            raise KeyError
        assert torch.equal(cat_model(x), plain)
    assert torch.equal(model(x), corrected)


def test_attaching_twice_is_refused(model):
    cat_model = CATWrapper(model, _correction())
    for again in (model, cat_model, nn.Sequential(model)):
        with pytest.raises(CATError, match=r"already attached to this \w+; call remove\(\)"):
            CATWrapper(again, _correction())
    cat_model.remove()
    assert CATWrapper(model, _correction()).attached


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.relu, ClusterAffine.identity(3)),
            "quantized_model is a builtin_function_or_method; expected a torch.nn.Module",
        ),
        ((SmallNet(), nn.ReLU()), "correction is a ReLU; expected a ClusterAffine"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(CATError, match=message):
        CATWrapper(*arguments)


def test_deepcopy_of_the_model_stays_corrected(model):
    x = images()
    cat_model = CATWrapper(model, _correction())
    with cat_model.disabled():
        twin = copy.deepcopy(model)
    corrected = model(x)
    assert torch.equal(twin(x), corrected)
    cat_model.remove()
    assert torch.equal(twin(x), corrected)


def test_deepcopy_of_the_wrapper_is_independent(model):
    x = images()
    plain, cat_model = model(x), CATWrapper(model, _correction())
    corrected, twin = model(x), copy.deepcopy(cat_model)
    assert twin.attached
    assert torch.equal(twin(x), corrected)
    twin.remove()
    assert torch.equal(twin(x), plain)
    assert torch.equal(cat_model(x), corrected)


def test_pickle_of_the_model_stays_corrected(model):
    CATWrapper(model, _correction())
    loaded = copied(model, "save")
    assert torch.equal(loaded(images()), model(images()))


def test_hook_survives_another_hook_in_a_new_process(model, tmp_path):
    CATWrapper(model, _correction())
    torch.save((model, images(), model(images())), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, x, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "model.register_forward_hook(lambda *_: None)\n"
        "assert torch.equal(model(x), expected)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True)


def test_model_without_tensors_and_empty_batch():
    model = nn.Flatten()
    correction = _correction(6)
    cat_model = CATWrapper(model, correction)
    assert torch.equal(cat_model(images()), correction(images()))
    assert cat_model(images()[:0]).shape == (0, 6)


def test_half_output_keeps_its_dtype(model):
    CATWrapper(model.to(torch.bfloat16), _correction())
    assert model(images().to(torch.bfloat16)).dtype == torch.bfloat16


def test_unsupported_output_is_an_error_at_the_call():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(CATError, match="Pair returned a tuple of 2"):
        CATWrapper(Pair(), _correction())(images())


def test_export_of_the_hooked_model(model):
    CATWrapper(model, _correction())
    program = torch.export.export(model, (images(),))
    torch.testing.assert_close(program.module()(images()), model(images()))


def test_mode_and_repr(model):
    quantized, _ = model_pair()
    assert CATWrapper(quantized, _correction()).training
    cat_model = CATWrapper(model, _correction())
    assert not cat_model.training
    assert repr(cat_model) == "CATWrapper(SmallNet, attached: 3 clusters)"
    cat_model.remove()
    assert repr(cat_model) == "CATWrapper(SmallNet, removed: 3 clusters)"


def test_a_corrected_model_cannot_be_scripted_and_says_what_can_be_done():
    quantized, fp = (nn.Sequential(nn.Linear(6, 4)).eval() for _ in range(2))
    cat_model = apply_cat(quantized, fp, images(100))
    with pytest.raises(CATError, match=r"torch\.jit\.trace takes the corrected model as it is"):
        torch.jit.script(quantized)
    assert not hasattr(cat_model._hook, "__name__")
    traced = torch.jit.trace(quantized, images(5))
    torch.testing.assert_close(traced(images(9)), quantized(images(9)))
    torch.jit.script(cat_model.remove())


def test_two_names_of_one_layer_are_an_error():
    model = torch.nn.Module()
    model.a = model.b = torch.nn.Linear(3, 3)
    parts = {name: ChannelAffine(torch.ones(3), torch.zeros(3), -1) for name in ("a", "b")}
    with pytest.raises(CATError, match="two of the layers a, b are one and the same"):
        CATWrapper(model, ClusterAffine.identity(3), layers=parts)
    assert not model.a._forward_hooks
