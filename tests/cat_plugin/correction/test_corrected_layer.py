import copy

import pytest
import torch
from torch import nn

from cat_plugin import CATWrapper, ChannelAffine, ClusterAffine
from cat_plugin.correction.corrected_layer import corrected_layer
from cat_plugin.correction.hook import find_hooks
from tests.cat_plugin.helpers import copied, state_of
from tests.cat_plugin.layers.networks import pictures, planted

AXES = {"first": -3, "second": -3, "last": -1}


def change(channels, axis):
    generator = torch.Generator().manual_seed(channels)
    scale, shift = (torch.rand(channels, generator=generator) for _ in range(2))
    return ChannelAffine(0.5 + scale, shift, axis)


def corrected(names=AXES, prepare=lambda model: None):
    """A hooked model with its wrapper, images, and what it gives for them."""
    model = planted()[0]
    prepare(model)
    layers = {name: change(len(getattr(model, name).bias), AXES[name]) for name in names}
    cat_model = CATWrapper(model, ClusterAffine.identity(5), layers=layers)
    x = pictures(9)
    with torch.no_grad():
        return cat_model, x, model(x)


def test_a_layer_and_its_correction_are_one():
    layer = nn.Conv2d(3, 6, 3)
    x, correction, plain = pictures(4), change(6, -3), copy.deepcopy(layer)
    made = corrected_layer(layer, correction)
    assert torch.equal(made(x), correction(plain(x)))
    assert isinstance(made, nn.Conv2d) and type(made).__name__ == "Conv2d"
    assert set(made.state_dict()) == {"weight", "bias", "cat_correction.scale", "cat_correction.shift"}


def test_of_several_outputs_the_first():
    layer = nn.MultiheadAttention(4, 2)
    x, correction = torch.randn(3, 2, 4), change(4, -1)
    expected, weights = layer(x, x, x)
    out = corrected_layer(layer, correction)(x, x, x)
    assert torch.equal(out[0], correction(expected)) and torch.equal(out[1], weights)


def test_the_baked_model_has_no_hooks_and_shares_weights():
    cat_model, x, expected = corrected()
    model = cat_model.quantized_model
    before, baked = state_of(model), cat_model.bake()
    assert not find_hooks(baked) and not any(module._forward_hooks for module in baked.modules())
    with torch.no_grad():
        assert torch.equal(baked(x), expected)
    assert {p.data_ptr() for p in baked.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert state_of(model) == before
    cat_model.remove()
    with torch.no_grad():
        assert torch.equal(baked(x), expected) and torch.equal(model(x), planted()[0](x))


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_stay_corrected(how):
    cat_model, x, expected = corrected()
    baked = cat_model.bake()
    clone = copied(baked, how)
    with torch.no_grad():
        assert torch.equal(clone(x), expected)
        clone.quantized_model.first.cat_correction.shift.add_(1)
        assert not torch.equal(clone(x), expected) and torch.equal(baked(x), expected)


def test_state_dict_holds_all_corrections():
    cat_model, x, expected = corrected()
    baked = cat_model.bake()
    state = {name: value.clone() for name, value in baked.state_dict().items()}
    found = {name for name in state if "cat_correction" in name}
    assert found == {f"quantized_model.{name}.cat_correction.{part}" for name in AXES for part in ("scale", "shift")}
    other = copy.deepcopy(baked)
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
        other.load_state_dict(state)
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("fold", [False, True], ids=["", "folded"])
def test_compilers_and_exporters(fold):
    cat_model, x, expected = corrected()
    baked = cat_model.bake(fold=fold)
    dynamic = ({0: torch.export.Dim("images", min=1)},)
    program = torch.export.export(baked, (pictures(4),), dynamic_shapes=dynamic).module()
    compiled = torch.compile(baked, backend="eager", fullgraph=True)
    with torch.no_grad():
        for way in (baked, program, compiled):
            torch.testing.assert_close(way(x), expected, rtol=0, atol=1e-4)


def hooked(model):
    model.second.register_forward_hook(lambda module, args, out: out * 2 + 1)


def overridden(model):
    plain = model.second.forward
    model.second.forward = lambda x: plain(x) * 2 + 1


@pytest.mark.parametrize("prepare", [hooked, overridden])
def test_what_others_do_to_a_layer_comes_before_its_correction(prepare):
    cat_model, x, expected = corrected(prepare=prepare)
    baked = cat_model.bake()
    with torch.no_grad():
        assert torch.equal(baked(x), expected)
        by_hand = planted()[0]
        layers = cat_model.layers
        hidden = by_hand.rounded(torch.relu(layers["first"](by_hand.first(x))))
        hidden = by_hand.rounded_again(torch.relu(layers["second"](by_hand.second(hidden) * 2 + 1)))
        assert torch.equal(layers["last"](by_hand.last(hidden.amax(dim=(2, 3)))), expected)


def test_a_layer_with_two_names_is_corrected_once():
    def twice(model):
        model.same = model.first

    cat_model, x, expected = corrected(prepare=twice)
    baked = cat_model.bake()
    assert baked.quantized_model.same is baked.quantized_model.first
    with torch.no_grad():
        assert torch.equal(baked(x), expected)


def test_disabled_switches_all_hooks():
    cat_model, x, expected = corrected()
    model = cat_model.quantized_model
    with torch.no_grad():
        with cat_model.disabled():
            assert torch.equal(model(x), planted()[0](x))
            with cat_model.disabled():
                assert torch.equal(model(x), planted()[0](x))
            assert torch.equal(model(x), planted()[0](x))
        assert torch.equal(model(x), expected)


def test_disabled_in_one_thread_leaves_the_others_alone():
    from concurrent.futures import ThreadPoolExecutor

    cat_model, x, expected = corrected()
    model = cat_model.quantized_model
    with ThreadPoolExecutor(1) as pool, torch.no_grad(), cat_model.disabled():
        assert torch.equal(pool.submit(torch.no_grad()(model), x).result(), expected)
        assert torch.equal(model(x), planted()[0](x))
