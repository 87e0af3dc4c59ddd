import pytest
import torch
from torch import nn

from cat_plugin import CATError
from cat_plugin.running.taps import captured, find_layer
from tests.cat_plugin.helpers import SmallNet, images, state_of


def runs(layer):
    """A network that runs `inner` as often as `layer` says, and then changes its output in place."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x):
            out = [self.inner(x + place) for place in range(layer)]
            return out[-1].zero_() if out else x

    return Net().eval()


@pytest.mark.parametrize("fails", [False, True], ids=["normal", "raises"])
@pytest.mark.parametrize("layer", [None, "last"])
def test_hook_is_there_inside_of_the_block_alone(layer, fails):
    model = SmallNet().eval()
    before = state_of(model)
    target = model if layer is None else model.last
    try:
        with captured(model, "lq", layer, None) as capture:
            assert list(target._forward_hooks.values()) == [capture]
            expected = model(images(3))
            assert torch.equal(capture.take(), expected)
            if fails:
                raise KeyError("from the body")
    except KeyError:
        assert fails
    assert state_of(model) == before


def test_output_of_a_layer_is_kept_before_others_change_it():
    model, x = runs(1), images(3)
    with torch.no_grad(), captured(model, "lq", "inner", None) as capture:
        expected = model.inner(x)
        capture.take()
        assert not model(x).any()
        assert torch.equal(capture.take(), expected)
    with captured(model, "lq", "inner", None) as capture:
        model(x)
        assert not capture.take().requires_grad


def test_last_of_several_passes_of_the_model_counts():
    model = SmallNet().eval()
    with captured(model, "lq", None, None) as capture:
        model(images(3))
        expected = model(images(5))
        assert torch.equal(capture.take(), expected)
        with pytest.raises(CATError, match="the forward hook on lq never fired for a batch"):
            capture.take()


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (0, "^layer 'inner' of lq did not run in a forward pass; name one that does$"),
        (2, "^layer 'inner' of lq ran 2 times in a forward pass; name one that runs once$"),
    ],
)
def test_layer_that_does_not_run_once(times, message):
    model = runs(times)
    with torch.no_grad(), captured(model, "lq", "inner", None) as capture:
        model(images(3))
        with pytest.raises(CATError, match=message):
            capture.take()


def test_outputs_are_read_where_they_are_said_to_be():
    model = SmallNet().eval()
    model.last.register_forward_hook(lambda module, args, out: {"a": out[:, :3], "b": out})
    with captured(model, "lq", "last", "a") as capture:
        assert model(images(3))["b"].shape == (3, 10)
        assert capture.take().shape == (3, 3)


def test_layer_is_found_by_any_of_its_names():
    model = SmallNet()
    model.again = nn.ModuleList([model.first])
    assert find_layer(model, "again.0", "layer") is find_layer(model, "first", "layer") is model.first


@pytest.mark.parametrize("name", ["second", "", "first.weight", 3, None], ids=repr)
def test_layer_that_there_is_not(name):
    message = rf"^argument={name!r} is no layer of SmallNet; its children are first, last, norm, drop$"
    with pytest.raises(CATError, match=message):
        find_layer(SmallNet(), name, "argument")
