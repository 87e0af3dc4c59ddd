import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

from baselines import quantize, summarize
from baselines.network.attention import Product
from baselines.network.plain_copy import plain_copy
from baselines.quantization.quantizers import ActivationQuantizer

from ..networks import images, randomized


class Attention(nn.Module):
    """Self-attention over pixels, written in the ways that networks in the wild do it."""

    def __init__(self, how: str, width: int = 4) -> None:
        super().__init__()
        self.how, self.qkv, self.proj = how, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        if self.how == "functional-linear":
            q, k, v = functional.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
            x = (q @ k.mT).softmax(-1) @ v
            return functional.linear(x, weight=self.proj.weight, bias=self.proj.bias * 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.how == "operator":
            x = (q @ k.mT).softmax(-1).matmul(v)
        elif self.how == "bmm":
            x = torch.bmm(torch.baddbmm(x.new_ones(1, 1, 1), q, k.mT, alpha=0.5).softmax(-1), v)
        elif self.how == "einsum":
            x = torch.einsum("nij,njc->nic", torch.einsum("nic,njc->nij", q, k).softmax(-1), v)
        elif self.how == "fused":
            x = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, how: str, width: int = 4) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(how, width)
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 4, 2, 2), Block(how), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x).flatten(2).mT).mean(1))


HOWS = ("operator", "bmm", "einsum", "fused", "functional-linear")


@pytest.mark.parametrize("how", HOWS)
def test_products_and_layers_are_found_however_they_are_written(how):
    model = randomized(Transformer(how))
    plain = plain_copy(model, images(2))
    torch.testing.assert_close(plain(images(5)), model(images(5)))
    assert sum(isinstance(module, Product) for module in plain.modules()) == 2
    summary = summarize(quantize(model, images(8), method="rtn", a_bits=3))
    assert [layer.name for layer in summary.layers] == [
        *("stem", "block.attention.qkv", "block.attention.proj", "block.mlp.0", "block.mlp.2", "head")
    ]
    assert [layer.input_bits for layer in summary.layers] == [32, 3, 3, 3, 3, 8]
    assert [(product.left_bits, product.right_bits) for product in summary.products] == [(3, 3), (3, 3)]
    assert summary.floating_point.unquantized == ()


@pytest.mark.parametrize("how", HOWS)
def test_a_quantized_transformer_block_equals_the_same_written_out(how):
    """The reference calls no module of the network: it takes weights, scales and zero points and computes by hand."""
    model = randomized(Transformer(how))
    network = quantize(model, images(8), method="rtn", w_bits=3, a_bits=3)
    state, x = network.state_dict(), images(4)

    def on_grid(x, name, levels=7):
        scale, zero_point = state[f"{name}.scale"], state[f"{name}.zero_point"]
        return ((x / scale).round() + zero_point).clamp(0, levels).sub(zero_point) * scale

    def linear(x, name):
        return x @ state[f"{name}.weight"].mT + state[f"{name}.bias"]

    scores, mix = (name for name, module in network.named_modules() if isinstance(module, Product))
    x = functional.conv2d(x, state["stem.weight"], state["stem.bias"], stride=2).flatten(2).mT
    y = functional.layer_norm(x, (4,), state["block.norm.weight"], state["block.norm.bias"])
    y = linear(on_grid(y, "block.attention.qkv.input_quantizer"), "block.attention.qkv")
    q, k, v = y.split(4, -1)
    q = q / 2 if how == "fused" else q
    y = on_grid(q, f"{scores}.left_quantizer") @ on_grid(k, f"{scores}.right_quantizer").mT
    y = torch.softmax(y * 0.5 + 1 if how == "bmm" else y, -1)
    y = on_grid(y, f"{mix}.left_quantizer") @ on_grid(v, f"{mix}.right_quantizer")
    y = linear(on_grid(y, "block.attention.proj.input_quantizer"), "block.attention.proj")
    if how == "functional-linear":
        y = y + state["block.attention.proj.bias"]
    x = x + y
    y = functional.gelu(linear(on_grid(x, "block.mlp.0.input_quantizer"), "block.mlp.0"))
    x = x + linear(on_grid(y, "block.mlp.2.input_quantizer"), "block.mlp.2")
    expected = linear(on_grid(x.mean(1), "head.input_quantizer", 255), "head")
    torch.testing.assert_close(network(images(4)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["operator", "fused", "functional-linear"])
def test_reconstruction_learns_the_scales_inside_of_attention(how):
    model = randomized(Transformer(how))
    before = quantize(model, images(32), method="rtn", w_bits=4, a_bits=4).state_dict()
    after = quantize(model, images(32), method="qdrop", w_bits=4, a_bits=4, iters=5, batch_size=16).state_dict()
    scales = [key for key in after if "products" in key and key.endswith("scale")]
    assert len(scales) == 4 and all(before[key] != after[key] for key in scales)


def test_signed_and_unsigned_activations_get_zero_points_of_their_own():
    network = quantize(randomized(Transformer("operator")), images(16), method="rtn", w_bits=8, a_bits=4)
    mix = next(m for name, m in network.named_modules() if name.endswith("products.1"))
    assert mix.left_quantizer.zero_point == 0  # probabilities
    assert 0 < mix.right_quantizer.zero_point < 15  # values
    assert 0 < network.block.mlp[2].input_quantizer.zero_point < 8  # GELU goes down to -0.17


def test_modules_routed_inside_of_routed_ones_keep_their_calls_apart():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner, self.head = nn.Conv2d(3, 4, 2, 2), Attention("operator"), nn.Linear(4, 3)

        def forward(self, x):
            x = self.stem(x).flatten(2).mT
            x = x @ (x.mT.softmax(-1) @ self.inner(x))
            return self.head((x + self.inner(x) @ (x.mT.softmax(-1) @ x)).mean(1))

    model = randomized(Outer())
    plain = plain_copy(model, images(2))
    torch.testing.assert_close(plain(images(3)), model(images(3)), rtol=1e-4, atol=1e-4)
    assert [name for name, m in plain.named_modules() if isinstance(m, Product)] == [
        *("inner.products.0", "inner.products.1"),
        *("products.0", "products.1", "products.2", "products.3"),
    ]
    quantized = quantize(model, images(8), method="rtn", w_bits=8, a_bits=8)
    difference = (quantized(images(3)) - model(images(3))).norm()
    assert 0 < difference < 0.1 * model(images(3)).norm()
    summary = summarize(quantized)
    assert [(product.left_bits, product.right_bits) for product in summary.products] == [(8, 8)] * 6
    assert summary.floating_point.unquantized == ()


class Constant(nn.Module):
    """Multiplies by a parameter or a buffer of its own, between two layers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.before, self.after = how, nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)
        self.square, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.register_buffer("blur", torch.tensor([[1.0, 2, 1], [2, 5, 2], [1, 2, 1]]).view(1, 1, 3, 3) / 17)
        self.register_buffer("cosines", torch.randn(8, 8))

    def forward(self, x):
        x = self.multiplied(self.before(x).relu())
        return self.head(self.pool(self.after(x)).flatten(1))

    def multiplied(self, x):
        if self.how == "right":
            return x @ self.square.T
        if self.how == "left":
            return torch.einsum("ij,ncjk->ncik", self.square, x)
        if self.how == "linear":
            return functional.linear(x, self.cosines, bias=self.bias)
        return functional.conv2d(x, self.blur.expand(4, 1, 3, 3), padding=1, groups=4)

    def weight(self):
        return {"conv": self.blur, "linear": self.cosines}.get(self.how, self.square)


def near(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounded to a grid of `2**bits` values between the extremes and zero."""
    low, high = values.min().clamp(max=0), values.max().clamp(min=0)
    step = (high - low) / (2**bits - 1)
    return ((values / step).round() + (-low / step).round()).clamp(0, 2**bits - 1) * step - (-low / step).round() * step


@pytest.mark.parametrize(("w_bits", "a_bits"), [(3, 2), (32, 2), (3, 32)])
@pytest.mark.parametrize("how", ["right", "left", "linear", "conv"])
def test_products_with_weights_of_no_layer_are_quantized(how, w_bits, a_bits):
    """The reference rounds both factors for itself, between the extremes of what it sees."""
    model, x = randomized(Constant(how)), images(8)
    network = quantize(model, x, method="rtn", range_method="minmax", w_bits=w_bits, a_bits=a_bits)
    summary = summarize(network)
    left, right = (w_bits, a_bits) if how == "left" else (a_bits, w_bits)
    assert [(product.left_bits, product.right_bits) for product in summary.products] == [(left, right)]
    assert summary.floating_point.unquantized == ()
    seen = []
    network.after.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    network(x)
    with torch.no_grad():
        twin = copy.deepcopy(model)
        entered = network.before(x).relu()
        if a_bits < 32:  # the ranges are those of the network in floating point
            read, low, high = model.before(x).relu(), 0, 2**a_bits - 1
            step = read.max() / high
            entered = (entered / step).round().clamp(low, high) * step
        if w_bits < 32:
            twin.weight().copy_(near(model.weight(), w_bits))
        expected = twin.multiplied(entered)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)


def test_weights_of_no_layer_have_eight_bits_where_they_read_the_images_or_give_the_outputs():
    class Ends(nn.Module):
        """A fixed filter first, then a layer that reads what it makes of the images, and a head without a layer."""

        def __init__(self):
            super().__init__()
            self.register_buffer("blur", torch.full((3, 1, 3, 3), 1 / 9))
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            x = self.a(functional.conv2d(x, self.blur, groups=3)).relu()
            return self.b(x).mean((2, 3)) @ self.head

    summary = summarize(quantize(randomized(Ends()), images(8), method="rtn", w_bits=3, a_bits=3))
    assert [(row.name, row.weight_bits, row.input_bits) for row in summary.layers] == [("a", 8, 32), ("b", 3, 3)]
    # Numbered ones come first, filters after them.
    assert [(row.left_bits, row.right_bits) for row in summary.products] == [(8, 8), (32, 8)]


def test_weight_of_a_layer_that_is_multiplied_by_instead_of_called_is_quantized():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)) @ self.fc.weight.T)

    summary = summarize(quantize(randomized(Tied()), images(8), method="rtn", w_bits=3, a_bits=4))
    assert [row.name for row in summary.layers] == ["conv", "head"]
    assert [(row.left_bits, row.right_bits) for row in summary.products] == [(4, 3)]
    assert summary.floating_point.unquantized == ()


def test_scales_of_weights_of_no_layer_are_learned():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Constant("right"))
    model[1].before = nn.Conv2d(4, 4, 1)
    before, after = (
        quantize(randomized(model), images(32), method=how, w_bits=3, a_bits=3, iters=5, batch_size=16).state_dict()
        for how in ("rtn", "qdrop")
    )
    scales = [key for key in after if "products" in key and key.endswith("scale")]
    assert len(scales) == 2 and all(before[key] != after[key] for key in scales)


def test_product_with_a_weight_that_is_computed_stays_in_floating_point_and_that_is_said(caplog):
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.fc = nn.Parameter(torch.eye(3)), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(functional.linear(x.mean((2, 3)), self.weight.exp()))

    network = quantize(randomized(Computed()), images(8), method="rtn")
    assert not any(isinstance(module, Product) for module in network.modules())
    assert summarize(network).floating_point.unquantized == ("linear in Computed",)
    assert "left in floating point" in caplog.text and "linear in Computed" in caplog.text


def test_tables_of_positions_are_neither_quantized_nor_said():
    class Rotary(Attention):
        def __init__(self):
            super().__init__("operator")
            self.register_buffer("frequencies", torch.tensor([[1.0, 0.01]]))

        def forward(self, x):
            angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] @ self.frequencies
            return super().forward(x * angles.repeat(1, 2).cos())

    model = Transformer("operator")
    model.block.attention = Rotary()
    summary = summarize(quantize(randomized(model), images(8), method="rtn"))
    assert len(summary.products) == 2
    assert summary.floating_point.unquantized == () and summary.floating_point.operations["matmul"] == 1


class ByOperator(nn.Linear):
    """A layer that multiplies for itself."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Summed(nn.Module):
    """Products in another number at each of its calls."""

    def forward(self, x, times):
        for _ in range(times):
            x = (x @ x.mT).softmax(-1) @ x
        return x


@pytest.mark.parametrize("inner", ["layer", "differing calls"])
def test_products_of_modules_inside_that_are_not_led_are_not_counted(inner):
    class Around(Attention):
        def __init__(self):
            super().__init__("operator")
            self.inner = Summed() if inner == "differing calls" else ByOperator(4, 4)

        def forward(self, x):
            x = self.inner(self.inner(x, 1), 2) if inner == "differing calls" else self.inner(x)
            return super().forward(x)

    model = Transformer("operator")
    model.block.attention = Around()
    network = quantize(randomized(model), images(8), method="rtn", w_bits=8, a_bits=8)
    assert (network(images(4)) - model(images(4))).norm() < 0.1 * model(images(4)).norm()
    summary = summarize(network)
    assert [row.name for row in summary.products] == ["block.attention.products.0", "block.attention.products.1"]
    assert ("block.attention.inner" in [row.name for row in summary.layers]) == (inner == "layer")
    left = ("matmul in block.attention.inner",) if inner == "differing calls" else ()
    assert summary.floating_point.unquantized == left
    with pytest.raises(RuntimeError):
        network.block.attention(torch.zeros(2, 5, 7))
    assert torch.isfinite(network(images(2))).all()


def test_more_products_than_seen_are_a_clear_error():
    class Depends(Attention):
        def forward(self, x):
            x = super().forward(x)
            return x if x.shape[0] != 3 else x @ (x.mT @ x)

    model = Transformer("operator")
    model.block.attention = Depends("operator")
    network = quantize(randomized(model), images(8), method="rtn", batch_size=8)
    with pytest.raises(ValueError, match=r"block\.attention \(Depends\) computes more products than the 2"):
        network(images(3))


def test_routed_modules_survive_copying_saving_exporting_and_compiling():
    network = quantize(randomized(Transformer("functional-linear")), images(8), method="rtn")
    assert isinstance(network.block.attention, Attention)
    x, file = images(8), io.BytesIO()
    expected = network(x)
    torch.save(network, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    assert torch.equal(copy.deepcopy(network)(x), expected)
    torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), expected)


def test_a_failing_pass_leaves_no_router_behind():
    network = quantize(randomized(Transformer("operator")), images(8), method="rtn")
    with pytest.raises(RuntimeError):
        network.block.attention(torch.zeros(2, 5, 7))
    x = torch.randn(2, 4, 4)
    assert torch.equal(x @ x, torch.matmul(x, x))
    assert not any(isinstance(m, ActivationQuantizer) and m.bypass for m in network.modules())
    assert torch.isfinite(network(images(2))).all()


class OwnProducts(Attention):
    """Has an attribute called as the routed products are."""

    def __init__(self):
        super().__init__("operator")
        self.products = nn.Linear(4, 4)

    def forward(self, x):
        return super().forward(self.products(x))


def test_attribute_of_the_users_called_products_is_no_obstacle():
    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(2), nn.Linear(16, 4), OwnProducts(), nn.Linear(4, 3))
    network = quantize(randomized(model), images(8), method="rtn")
    summary = summarize(network)
    assert [product.name for product in summary.products] == ["3.routed_products.0", "3.routed_products.1"]
    assert [layer.name for layer in summary.layers if "products" in layer.name] == ["3.products"]


class Convolving(nn.Module):
    """Hands the weights of its layers to functions, in a block with a shortcut."""

    def __init__(self, bias=True, **settings):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1, bias=bias), nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=bias)
        self.settings = {"padding": (1, 1), "groups": 2} | settings

    def forward(self, x):
        y = functional.conv2d(x, self.a.weight).relu()
        return functional.conv2d(y, self.b.weight, bias=self.b.bias, **self.settings) + x


def convolving(**settings):
    return randomized(nn.Sequential(nn.Conv2d(3, 4, 1), Convolving(**settings), nn.Flatten(), nn.Linear(256, 3)))


@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_by_function_are_led_through_their_layers(bias):
    model = convolving(bias=bias)
    torch.testing.assert_close(plain_copy(model, images(2))(images(5)), model(images(5)), rtol=1e-4, atol=1e-5)
    network = quantize(model, images(16), method="rtn", w_bits=3, a_bits=3)
    assert [(row.name, row.weight_bits, row.input_bits) for row in summarize(network).layers] == [
        *(("0", 8, 32), ("1.a", 3, 3), ("1.b", 3, 3), ("3", 8, 8))
    ]
    assert summarize(network).floating_point.unquantized == ()
    state, x = network.state_dict(), network[0](images(4))

    def on_grid(x, name):
        scale, zero_point = state[f"{name}.scale"], state[f"{name}.zero_point"]
        return ((x / scale).round() + zero_point).clamp(0, 7).sub(zero_point) * scale

    x = on_grid(x, "1.input_quantizer")  # read by the block's first layer, and so by the shortcut
    y = on_grid(functional.conv2d(x, state["1.a.weight"]).relu(), "1.b.input_quantizer")
    expected = functional.conv2d(y, state["1.b.weight"], state.get("1.b.bias"), padding=1, groups=2) + x
    torch.testing.assert_close(network[1](network[0](images(4))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["adaround", "brecq", "qdrop"])
def test_roundings_of_convolutions_by_function_are_learned(method):
    nearest, learned = (
        quantize(convolving(), images(32), method=how, w_bits=2, a_bits=4, iters=30, batch_size=16)
        for how in ("rtn", method)
    )
    moved = [
        not torch.equal(nearest[1].get_parameter(n), learned[1].get_parameter(n)) for n in ("a.weight", "b.weight")
    ]
    assert any(moved)


def test_convolution_of_other_settings_than_the_layers_is_said():
    model = convolving(padding=2, dilation=2)
    summary = summarize(quantize(model, images(16), method="rtn"))
    assert [row.name for row in summary.layers] == ["0", "1.a", "3"]
    assert summary.floating_point.unquantized == ("1.b", "conv2d in 1")
