import contextlib
import hashlib
import random
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from baselines import METHODS, QuantSpec, quantize, summarize

from .networks import Brightness, SmallResNet, Windows, images, randomized, same


def snapshot(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    flags = [m.training for m in model.modules()]
    grads = [p.grad for p in model.parameters()]
    inplace = [getattr(m, "inplace", None) for m in model.modules()]
    return tensors, hooks, flags, [p.requires_grad for p in model.parameters()], grads, inplace


def equal(a, b):
    return all(torch.equal(a[0][key], b[0][key]) for key in a[0]) and a[1:] == b[1:]


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_fp_model_and_random_states_are_untouched(method):
    model = randomized(SmallResNet())
    model.layer1[0].train()
    before, states = snapshot(model), random_states()
    loader = DataLoader(TensorDataset(images(40), torch.zeros(40)), batch_size=7, shuffle=True)
    network = quantize(model, loader, method=method, iters=3, batch_size=16)
    assert equal(snapshot(model), before)
    assert random_states() == states
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(m.training for m in network.modules())
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in network.state_dict().values()}


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_carries_the_whole_quantized_model(method):
    model = randomized(SmallResNet())
    network = quantize(model, images(40), method=method, w_bits=2, a_bits=3, iters=5, batch_size=16)
    other = quantize(model, images(16, seed=9), method="rtn", w_bits=2, a_bits=3)
    assert not torch.equal(other(images(4)), network(images(4)))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(images(4)), network(images(4)))


def test_eight_bits_are_close_to_floating_point_and_two_are_not():
    model = randomized(SmallResNet())
    fp = model(images(30))
    errors = [
        (quantize(model, images(30), method="rtn", w_bits=b, a_bits=b)(images(30)) - fp).norm() for b in (8, 4, 2)
    ]
    assert errors[0] < 0.02 * fp.norm() < errors[1] < errors[2]


def test_everything_off_gives_the_fp_model():
    model = randomized(SmallResNet())
    network = quantize(model, images(16), method="rtn", w_bits=32, a_bits=32)
    torch.testing.assert_close(network(images(4)), model(images(4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_learn_like_float32_and_come_back_as_they_were(dtype):
    options = {"method": "qdrop", "w_bits": 3, "a_bits": 3, "iters": 60, "batch_size": 16}
    model = randomized(SmallResNet())
    inputs = images(32).to(dtype)
    other = quantize(model.to(dtype), inputs, **options)
    rounded = quantize(model.to(dtype), inputs, **options | {"method": "rtn"})
    scales = [(k, v) for k, v in other.state_dict().items() if k.endswith("input_quantizer.scale")]
    assert {value.dtype for value in other.state_dict().values()} == {dtype}
    if dtype != torch.bfloat16:  # which cannot tell scales apart that differ by so little
        assert scales and all(value != rounded.state_dict()[key] for key, value in scales if "fc" not in key)
    reference = quantize(model.float(), inputs.float(), **options)
    tolerance = {torch.float16: 4e-2, torch.bfloat16: 2e-1, torch.float64: 1e-1}[dtype]
    difference = (other(inputs).float() - reference(inputs.float())).abs().mean()
    assert difference < tolerance * reference(inputs.float()).abs().mean()


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, autocast])
def test_callers_context_does_not_matter(context):
    model = randomized(SmallResNet())
    expected = quantize(model, images(32), iters=3, batch_size=16)
    with context():
        network = quantize(model, images(32), iters=3, batch_size=16)
    assert torch.equal(network(images(3)), expected(images(3)))


def test_hooks_of_the_fp_model_do_not_run_and_are_not_taken_over():
    model, seen = randomized(SmallResNet()), []
    model.layer1[0].register_forward_hook(lambda *args: seen.append(args))
    network = quantize(model, images(16), iters=2, batch_size=16)
    assert not seen
    network(images(1))
    assert not seen
    model(images(1))
    assert len(seen) == 1


@pytest.mark.parametrize("method", METHODS)
def test_layers_of_other_dimensions_and_called_by_keyword(method):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv2, self.conv3 = nn.Conv2d(3, 4, 1), nn.Conv3d(4, 2, 1)
            self.conv1, self.depthwise = nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3, groups=4)
            self.fc, self.never = nn.Linear(4, 3), nn.Linear(2, 2)
            self.register_buffer("anchors", torch.zeros(1, 1, 1, 1, 2))

        def forward(self, x):
            x = self.conv3(input=self.conv2(input=x).relu().unsqueeze(2)).flatten(2).relu()
            return self.fc(self.depthwise(self.conv1(x).relu()).mean(2))

    model = randomized(Odd())
    network = quantize(model, images(20), method=method, w_bits=8, a_bits=8, iters=3, batch_size=16)
    torch.testing.assert_close(network(images(4)), model(images(4)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method='magic' should be one of rtn, adaround, brecq, qdrop"),
        ({"w_bits": 1}, "w_bits=1 should be an integer from 2 to 8, or 32"),
        ({"a_bits": 9}, "a_bits=9"),
        ({"a_bits": 4.0}, r"a_bits=4\.0"),
        ({"range_method": "max"}, "range_method='max' should be one of mse, minmax"),
        ({"error_weighting": "hessian"}, "error_weighting='hessian' should be one of none, fisher"),
        ({"iters": -1}, "iters=-1 should be an integer, at least 0"),
        ({"iters": 2.5}, r"iters=2\.5"),
        ({"batch_size": 0}, "batch_size=0 should be an integer, at least 1"),
        ({"seed": "a"}, "seed='a' should be an integer"),
        ({"batch_size": 64}, "20 calibration inputs are fewer than one batch of 64"),
    ],
)
def test_bad_options_are_clear_errors(options, message):
    with pytest.raises(ValueError, match=message):
        quantize(randomized(SmallResNet()), images(20), **options)


def test_model_without_parameters_is_a_clear_error():
    with pytest.raises(ValueError, match="Flatten has no floating-point parameter"):
        quantize(nn.Flatten(), images(20))


def test_spec_is_a_value():
    assert QuantSpec(w_bits=2) == QuantSpec(w_bits=2) != QuantSpec(w_bits=3)
    with pytest.raises(AttributeError):
        QuantSpec().w_bits = 3


@pytest.mark.parametrize("method", ["rtn", "qdrop"])
def test_control_flow_that_depends_on_data_is_a_clear_error(method):
    model = randomized(Brightness())
    before = snapshot(model)
    inputs = torch.cat([images(16), images(16) + 5])
    with pytest.raises(ValueError, match="bright runs 1 times for some calibration images, but 0 times for the first"):
        quantize(model, inputs, method=method, iters=3, batch_size=16)
    assert equal(snapshot(model), before)


class Logarithm(nn.Module):
    """Gives NaN for images that are dark on average."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.conv(self.stem(x) + x.mean((1, 2, 3), keepdim=True).log()).mean((2, 3)))


@pytest.mark.parametrize("method", ["rtn", "qdrop"])
def test_nan_in_activations_is_a_clear_error(method):
    model = randomized(Logarithm())
    before = snapshot(model)
    with pytest.raises(ValueError, match="the input of conv holds NaN or infinite values in the full-precision net"):
        quantize(model, torch.cat([images(15) + 1, images(1) - 1]), method=method, iters=3, batch_size=16)
    assert equal(snapshot(model), before)


def test_nan_that_only_reconstruction_sees_names_unit_and_step():
    """Ranges are searched on the first 256 images."""
    model = randomized(Logarithm())
    before = snapshot(model)
    with pytest.raises(FloatingPointError, match=r"loss of conv is nan at step [0-9]+"):
        quantize(model, torch.cat([images(256) + 1, images(8) - 1]), iters=30, batch_size=64)
    assert equal(snapshot(model), before)


def test_users_blocks_are_reconstructed_as_one(caplog):
    with caplog.at_level("DEBUG", logger="baselines"):
        quantize(randomized(SmallResNet()), images(16), iters=2, batch_size=16, blocks=["layer1"])
    units = {record.args[0] for record in caplog.records if "step" in record.msg and record.levelname == "DEBUG"}
    assert units == {"conv1", "layer1", "fc"}


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_see_windows_of_an_image_are_no_obstacle(method, caplog):
    model = randomized(Windows())
    network = quantize(model, images(32), method=method, w_bits=8, a_bits=8, iters=3, batch_size=16, blocks=[])
    assert (network(images(8)) - model(images(8))).norm() < 0.1 * model(images(8)).norm()
    assert ("only rounded" in caplog.text) == (method == "pd_quant")  # whose loss is about whole images


def test_blocks_do_not_change_what_is_quantized():
    model = randomized(SmallResNet())
    automatic, none = (quantize(model, images(16), method="rtn", blocks=blocks) for blocks in (None, []))
    bits = [
        [(layer.name, layer.weight_bits, layer.input_bits) for layer in summarize(m).layers] for m in (automatic, none)
    ]
    assert bits[0] == bits[1]
    with pytest.raises(
        ValueError, match=r"blocks names 'layer2', but SmallResNet has no such module; close to it: layer1"
    ):
        quantize(model, images(16), blocks=["layer2"], batch_size=16)


def test_calibration_images_can_be_told():
    network = quantize(randomized(SmallResNet()), images(40), method="rtn")
    digests = {hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:16] for image in images(40)}
    assert network.calibration_digests == digests


class Repeated(nn.Module):
    """Three layers, of which the middle one runs twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.twice(self.twice(self.stem(x).relu()).relu()).mean((2, 3)))


@pytest.mark.parametrize(("method", "said"), [("rtn", False), ("adaround", True), ("qdrop", True)])
def test_layers_that_run_more_than_once_are_rounded_and_that_is_said(method, said, caplog):
    quantize(randomized(Repeated()), images(16), method=method, iters=2, batch_size=16)
    assert ("called more than once: ['twice']" in caplog.text) == said


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.b(self.a(x).relu())

    def twice(self, x):
        return 2 * Doubled.forward(self, x)


@pytest.mark.parametrize("method", ["rtn", "adaround", "qdrop", "pd_quant"])
def test_forward_pass_set_on_a_block_itself_is_kept(method):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Doubled(), Doubled()), nn.Flatten(), nn.Linear(256, 3))
    model = randomized(model)
    model[1][0].forward = model[1][0].twice
    expected = model(images(4))
    network = quantize(model, images(16), method=method, w_bits=8, a_bits=8, iters=3, batch_size=16)
    assert (network(images(4)) - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(model(images(4)), expected)


def test_layer_with_a_forward_pass_of_its_own_stays_in_floating_point_and_that_is_said(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(256, 3))
    model = randomized(model)
    model[1].forward = types.MethodType(nn.Conv2d.forward, model[1])
    network = quantize(model, images(16), method="rtn")
    assert [layer.name for layer in summarize(network).layers] == ["0", "3"]
    assert "left in floating point" in caplog.text and "['1']" in caplog.text


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"method": "rtn"}, "no reconstruction"), ({"method": "qdrop", "iters": 2}, "2 steps a unit")],
    ids=["rtn", "qdrop"],
)
def test_what_was_done_is_logged(options, steps, caplog):
    with caplog.at_level("INFO", logger="baselines"):
        quantize(randomized(SmallResNet()), images(40), **options)
    assert f"{options['method']} W4A4: 40 images, {steps}, " in caplog.text


class Unused(Doubled):
    """One layer more, which does not reach the output."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        self.unused(x)
        return super().forward(x)


def with_blocks(kind):
    return randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(kind(), kind()), nn.Flatten(), nn.Linear(256, 3)))


@pytest.mark.parametrize("method", METHODS)
def test_layer_that_does_not_reach_the_output_of_its_block_is_rounded(method):
    network = quantize(with_blocks(Unused), images(32), method=method, w_bits=2, iters=30, batch_size=16)
    assert all(len(row.unique()) <= 4 for row in network[1][1].unused.weight)


class Shielded(Doubled):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("method", ["brecq", "qdrop", "pd_quant"])
def test_block_without_gradients_is_a_clear_error(method):
    model = with_blocks(Shielded)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no gradient .* take torch.no_grad and detach out of its forward pass"):
        quantize(model, images(32), method=method, iters=2, batch_size=16)
    assert equal(snapshot(model), before)


class ShieldedWhole(SmallResNet):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("options", "fails"),
    [
        ({"method": "qdrop"}, False),
        ({"method": "pd_quant"}, True),
        ({"method": "brecq", "error_weighting": "fisher"}, True),
    ],
    ids=["qdrop", "pd_quant", "fisher"],
)
def test_network_without_gradients_is_a_clear_error_where_its_predictions_are_looked_at(options, fails):
    expected = pytest.raises(ValueError, match="no gradient comes back to conv1") if fails else contextlib.nullcontext()
    with expected:
        quantize(randomized(ShieldedWhole()), images(32), iters=2, batch_size=16, **options)


def test_layers_that_see_windows_have_no_weights_of_predictions(caplog):
    options = {"method": "adaround", "error_weighting": "fisher", "iters": 2, "batch_size": 16}
    quantize(randomized(Windows()), images(32), **options)
    assert "only rounded, not reconstructed" in caplog.text and "block.inside" in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_default_device_does_not_matter(method):
    """On the meta device, whatever is made without a device would hold no data."""
    model = randomized(SmallResNet())
    options = {"method": method, "batch_size": 8} | ({} if method == "rtn" else {"iters": 2})
    expected = quantize(model, images(16), **options)
    inputs = images(16)
    with torch.device("meta"):
        network = quantize(model, inputs, **options)
    assert same(network, expected)
