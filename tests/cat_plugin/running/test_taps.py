import pytest
import torch
from torch import nn

from cat_plugin import CATError
from cat_plugin.running.taps import captured, find_layer, is_in_compiled
from tests.cat_plugin.helpers import SmallNet, images, state_of


@pytest.mark.parametrize("fails", [False, True], ids=["normal", "raises"])
def test_hook_is_there_inside_of_the_block_alone(fails):
    model = SmallNet().eval()
    before = state_of(model)
    try:
        with captured(model, None) as capture:
            assert list(model._forward_hooks.values()) == [capture]
            expected = model(images(3))
            assert torch.equal(capture.take(), expected)
            if fails:
                raise KeyError("from the body")
    except KeyError:
        assert fails
    assert state_of(model) == before


def test_last_of_several_passes_of_the_model_counts():
    model = SmallNet().eval()
    with captured(model, None) as capture:
        model(images(3))
        expected = model(images(5))
        assert torch.equal(capture.take(), expected)
        with pytest.raises(CATError, match="the forward hook on quantized_model never fired for a batch"):
            capture.take()


def test_outputs_are_read_where_they_are_said_to_be():
    model = SmallNet().eval()
    model.register_forward_hook(lambda module, args, out: {"a": out[:, :3], "b": out})
    with captured(model, "a") as capture:
        assert model(images(3))["b"].shape == (3, 10)
        assert capture.take().shape == (3, 3)


def test_layer_is_found_by_any_of_its_names():
    model = SmallNet()
    model.again = nn.ModuleList([model.first])
    assert find_layer(model, "again.0") is find_layer(model, "first") is model.first


@pytest.mark.parametrize("name", ["second", "", "first.weight", 3, None], ids=repr)
def test_layer_that_there_is_not(name):
    message = rf"^{name!r} is no layer of SmallNet; its children are first, last, norm, drop$"
    with pytest.raises(CATError, match=message):
        find_layer(SmallNet(), name)


def test_layer_whose_name_was_mistyped():
    model = nn.Sequential(SmallNet())
    with pytest.raises(CATError, match=r"'0\.frist' is no layer of Sequential; names like it are 0\.first"):
        find_layer(model, "0.frist")


def test_layers_inside_of_what_is_compiled():
    model = nn.Sequential(SmallNet(), torch.compile(SmallNet(), backend="eager"))
    names = ["0", "0.first", "1", "1._orig_mod", "1._orig_mod.first"]
    assert [is_in_compiled(dict(model.named_modules(remove_duplicate=False)), name) for name in names] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert find_layer(model, "1") is model[1]
    with pytest.raises(CATError, match=r"'1._orig_mod.first' is inside of a compiled Sequential, where hooks need not"):
        find_layer(model, "1._orig_mod.first")
