import functools
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn

from cat_plugin import CATWrapper, ChannelAffine, ClusterAffine
from cat_plugin.correction.hook import find_hooks
from tests.cat_plugin.helpers import copied, state_of


def change(channels):
    generator = torch.Generator().manual_seed(channels)
    scale, shift = (torch.rand(channels, generator=generator) for _ in range(2))
    return ChannelAffine(0.5 + scale, shift, -1)


class Net(nn.Module):
    """Two blocks and a head; `run` are the modules, or what is called for them, one after the other."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = (nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2))
            self.head = nn.Linear(6, 4)

    def run(self):
        return self.first, self.second, self.head

    def forward(self, x):
        for each in self.run():
            x = each(x)
        return x


class InList(Net):
    def __init__(self):
        super().__init__()
        self.blocks = []
        for block in (self.first, self.second):
            self.blocks.append(block)

    def run(self):
        return *self.blocks, self.head


class InNested(Net):
    def __init__(self):
        super().__init__()
        self.blocks = {"all": ((self.first[0], [self.first[1]]), self.second)}

    def run(self):
        (layer, (activation,)), second = self.blocks["all"]
        return layer, activation, second, self.head


class InUnregistered(Net):
    """The list holds a module that is no child, and that holds one."""

    def __init__(self):
        super().__init__()
        self.blocks = [nn.Sequential(self.first, nn.Tanh()), self.second]

    def run(self):
        return *self.blocks, self.head


class InMethod(Net):
    def __init__(self):
        super().__init__()
        self.call_first = self.first.forward
        self.call_rest = functools.partial(InMethod.rest, self)

    def rest(self, x):
        return self.head(self.second(x))

    def run(self):
        return self.call_first, self.call_rest


class OfParent(Net):
    """A child calls what its parent has."""

    class Child(nn.Module):
        def forward(self, x):
            return self.parent[0].first(x)

    def __init__(self):
        super().__init__()
        self.child = OfParent.Child()
        self.child.parent = [self]

    def run(self):
        return self.child, self.second, self.head


def in_order(module, x):
    return module[1](module[0](x))


def patched(how):
    def make():
        model = Net()
        how(model.first)
        return model

    return make


def with_method(block):
    block.forward = MethodType(in_order, block)


def with_partial(block):
    block.forward = functools.partial(in_order, block)


def with_closure(block):
    block.forward = lambda x: in_order(block, x)


def with_old_method(block):
    def forward(x, plain=block.forward):
        return plain(x) * 2

    block.forward = forward


def with_hook(block):
    block.register_forward_hook(lambda module, args, output: output + block[0](args[0]))


def with_hook_before(block):
    block.register_forward_pre_hook(MethodType(lambda self, module, args: (self[0](args[0]),), block))


MODELS = {
    "plain": Net,
    "list": InList,
    "nested": InNested,
    "unregistered": InUnregistered,
    "methods": InMethod,
    "parent": OfParent,
    "patched by a method": patched(with_method),
    "patched by a partial": patched(with_partial),
    "patched by a closure": patched(with_closure),
    "patched by what calls the old": patched(with_old_method),
    "hook": patched(with_hook),
    "hook before": patched(with_hook_before),
}
LAYERS = {"first.0": change(6), "second.0": change(6)}


def hooked(make, layers=LAYERS):
    model, x = make().eval(), torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(x)
        cat_model = CATWrapper(model, ClusterAffine.identity(4), layers=layers)
        expected = model(x)
    assert not torch.allclose(expected, plain, atol=0.01)
    return cat_model, x, expected, plain


@pytest.mark.parametrize("fold", [False, True], ids=["", "folded"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_baked_model_has_no_part_of_the_hooked_one(make, fold):
    cat_model, x, expected, plain = hooked(make)
    model = cat_model.quantized_model
    before, baked = state_of(model), cat_model.bake(fold=fold)
    assert state_of(model) == before
    with torch.no_grad():
        with cat_model.disabled():
            torch.testing.assert_close(baked(x), expected)
        cat_model.remove()
        torch.testing.assert_close(baked(x), expected)
        torch.testing.assert_close(copied(baked, "deepcopy")(x), expected)
        assert torch.equal(model(x), plain)
    if not fold:
        assert {p.data_ptr() for p in baked.parameters()} == {p.data_ptr() for p in model.parameters()}


def saved_exported_and_compiled(baked, x, expected):
    torch.compiler.reset()  # modules of other tests count as recompilations of the same code
    with torch.no_grad():
        torch.testing.assert_close(copied(baked, "save")(x), expected)
        torch.testing.assert_close(torch.export.export(baked, (x,)).module()(x), expected)
        torch.testing.assert_close(torch.compile(baked, backend="eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize("name", ["list", "nested", "unregistered", "methods", "patched by a partial"])
def test_saved_and_exported_and_compiled(name):
    cat_model, x, expected, _ = hooked(MODELS[name])
    baked = cat_model.bake()
    cat_model.remove()
    saved_exported_and_compiled(baked, x, expected)


def test_what_holds_no_corrected_layer_is_shared():
    cat_model, *_ = hooked(InList, {"second.0": change(6)})
    model = cat_model.quantized_model
    baked = cat_model.bake().quantized_model
    assert baked.blocks[0] is baked.first is model.first
    assert baked.blocks[1] is baked.second is not model.second
    assert model.blocks[1] is model.second and find_hooks(model)


class Own(nn.Linear):
    def __init__(self):
        super().__init__(6, 6)
        self.function, self.itself = self.multiply, [self]

    def multiply(self, x):
        return nn.functional.linear(x, self.weight, self.bias)

    def forward(self, x):
        return self.function(x)


class OfItself(Net):
    def __init__(self):
        super().__init__()
        self.first[0] = Own()


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_a_corrected_layer_that_holds_itself(how):
    cat_model, x, expected, _ = hooked(OfItself)
    baked = cat_model.bake()
    cat_model.remove()
    clone = copied(baked, how)
    layer = clone.quantized_model.first[0]
    assert layer.function.__self__ is layer and layer.itself[0] is layer
    with torch.no_grad():
        assert torch.equal(clone(x), expected)


def test_folded_quantizers_hold_the_folded_layer():
    class Quantizer(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.tracked = [layer]
            self.register_buffer("scale", layer.weight.detach().abs().amax(1, keepdim=True) / 7)

        def forward(self, weight):
            return (weight / self.scale).round() * self.scale

    class Quantized(nn.Linear):
        def __init__(self):
            super().__init__(6, 6)
            self.weight_quantizer = Quantizer(self)

        def forward(self, x):
            return nn.functional.linear(x, self.weight_quantizer(self.weight), self.bias)

    def make():
        model = Net()
        model.first[0] = Quantized()
        return model

    cat_model, x, expected, _ = hooked(make)
    baked = cat_model.bake(fold=True)
    cat_model.remove()
    torch.testing.assert_close(baked(x), expected)
    layer = baked.quantized_model.first[0]
    assert not baked.unfolded and layer.weight_quantizer.tracked[0] is layer


def test_objects_of_other_classes_are_left_alone():
    def make():
        model = Net()
        model.helper = SimpleNamespace(block=model.first)
        return model

    cat_model, x, expected, _ = hooked(make)
    baked = cat_model.bake()
    assert baked.quantized_model.helper is cat_model.quantized_model.helper
    assert torch.equal(baked(x), expected)


class Encoder(nn.Module):
    """Sequences (N, 6, 16) through two encoder layers, to logits (N, 4)."""

    def __init__(self, norm_first=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
            self.head = nn.Linear(16, 4)

    def forward(self, x, padding=None):
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


ENCODED = {
    "linear1": {"linear1": 32},
    "linear2": {"linear2": 16},
    "attention": {"self_attn": 16},
    "norm": {"norm1": 16},
    "dropout": {"dropout2": 16},
    "all of it": {"": 16},
    "several": {"self_attn": 16, "linear1": 32, "linear2": 16, "norm2": 16},
}


def hooked_encoder(parts, **options):
    model = Encoder(**options).eval()
    names = {f"encoder.layers.1.{part}".rstrip("."): change(channels) for part, channels in parts.items()}
    x = torch.randn(5, 6, 16, generator=torch.Generator().manual_seed(0))
    cat_model = CATWrapper(model, ClusterAffine.identity(4), layers=names)
    with torch.no_grad():
        expected = model(x)
        with cat_model.disabled():
            assert (model(x) - expected).abs().max() > 0.01
    return cat_model, x, expected


@pytest.mark.parametrize("fold", [False, True], ids=["", "folded"])
@pytest.mark.parametrize("parts", ENCODED.values(), ids=ENCODED)
@pytest.mark.parametrize("norm_first", [False, True], ids=["", "norm first"])
def test_transformer_encoders_call_their_corrected_layers(parts, fold, norm_first):
    cat_model, x, expected = hooked_encoder(parts, norm_first=norm_first)
    baked = cat_model.bake(fold=fold)
    cat_model.remove()
    with torch.no_grad():
        torch.testing.assert_close(baked(x), expected)
        torch.testing.assert_close(copied(baked, "deepcopy")(x), expected)
    torch.testing.assert_close(baked(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(baked(x), expected)


@pytest.mark.parametrize("parts", ENCODED.values(), ids=ENCODED)
def test_transformer_encoders_with_padding(parts):
    cat_model, x, without = hooked_encoder(parts)
    baked, padding = cat_model.bake(), torch.arange(6).expand(5, 6) > torch.tensor([[2], [5], [3], [4], [5]])
    with torch.no_grad():
        expected = cat_model(x, padding)
        assert not torch.allclose(expected, without, atol=0.01)
        torch.testing.assert_close(baked(x, padding), expected)
    torch.testing.assert_close(baked(x, padding), cat_model(x, padding))


def test_transformer_encoders_saved_and_exported_and_compiled():
    cat_model, x, expected = hooked_encoder(ENCODED["several"])
    baked = cat_model.bake()
    cat_model.remove()
    saved_exported_and_compiled(baked, x, expected)


def test_folded_layers_of_pytorch_keep_the_fast_path(monkeypatch):
    cat_model, x, expected = hooked_encoder({"linear1": 32, "linear2": 16})
    baked, plain = cat_model.bake(fold=True), cat_model.bake()
    taken = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: (taken.append(1), fast(*args))[1])
    with torch.no_grad():
        torch.testing.assert_close(baked(x), expected)
        assert len(taken) == 2
        torch.testing.assert_close(plain(x), expected)
        assert len(taken) == 3  # the layer without corrections
        cat_model.remove()(x)
        assert len(taken) == 5  # the user's model is as it was


class Rounded(nn.Linear):
    """Rounds its inputs."""

    def forward(self, x):
        return nn.functional.linear(x.round(), self.weight, self.bias)


def with_class(layer):
    layer.linear1 = Rounded(16, 32)


def with_forward(layer):
    layer.linear2.forward = MethodType(Rounded.forward, layer.linear2)


@pytest.mark.parametrize("prepare", [with_class, with_forward])
def test_layers_that_do_more_than_their_weights_say_are_called_beside_folded_ones(prepare):
    model = Encoder()
    prepare(model.eval().encoder.layers[0])
    x = torch.randn(5, 6, 16, generator=torch.Generator().manual_seed(0)) * 3
    cat_model = CATWrapper(model, ClusterAffine.identity(4), layers={"encoder.layers.0.linear1": change(32)})
    with torch.no_grad():
        expected, baked = model(x), cat_model.bake(fold=True)
        assert not baked.unfolded
        torch.testing.assert_close(baked(x), expected)


def test_hooks_put_on_the_one_do_not_act_on_the_other():
    net, seen = Net().eval(), []
    x = torch.randn(2, 6)
    baked = CATWrapper(net, ClusterAffine.identity(4), layers={"first.0": change(6)}).bake()
    inner = next(part for part in baked.children() if isinstance(part, Net))
    for number, module in enumerate((net, inner)):
        module.register_forward_pre_hook(lambda *_, number=number: seen.append(f"before {number}"))
        module.register_forward_hook(lambda *_, number=number, **__: seen.append(f"after {number}"), with_kwargs=True)
    net(x)
    assert seen == ["before 0", "after 0"]
    seen.clear()
    baked(x)
    assert seen == ["before 1", "after 1"]
