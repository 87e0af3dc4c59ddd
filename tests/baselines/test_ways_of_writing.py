"""Networks as people write them: what they do in place, hold in lists or patch is no reason for another result."""

import copy
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from baselines import quantize, summarize
from baselines.inputs import gather_inputs

from .networks import images


class Convolutions(nn.Module):
    """Of every pair, the first is written as people do, the second plainly."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5)
            self.flat = nn.Linear(6 * 36, 5)
        self.in_list, self.in_dict = [self.second], {"first": (self.first.__call__,)}

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


class Held(Convolutions):
    def forward(self, x):
        return self.head(F.relu(self.in_list[0](F.relu(self.in_dict["first"][0](x)))).mean((2, 3)))


class Flattening(Convolutions):
    def forward(self, x):
        return self.flat(F.relu(self.second(F.relu(self.first(x)))).flatten(1))


class Viewing(Convolutions):
    def forward(self, x):
        return self.flat(F.relu(self.second(F.relu(self.first(x)))).view(-1, 6 * 36))


class Adding(Convolutions):
    def forward(self, x):
        x = self.first(x)
        x = x + 20 * self.second(F.relu(x))
        return self.head(F.relu(x).mean((2, 3)))


class AddingInPlace(Convolutions):
    def forward(self, x):
        x = self.first(x)
        x += 20 * self.second(F.relu(x))
        return self.head(F.relu(x).mean((2, 3)))


class Scaling(Convolutions):
    def forward(self, x):
        return super().forward(x / 4)


class ScalingInPlace(Convolutions):
    def forward(self, x):
        x /= 4
        return super().forward(x)


class Silent(Convolutions):
    def train(self, mode=True):
        super().train(mode)


class Insisting(Convolutions):
    def forward(self, x):
        assert x.dtype == torch.float32
        return super().forward(x)


class Sparse(Convolutions):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(5).to_sparse())

    def forward(self, x):
        return (self.graph @ super().forward(x).T).T


PAIRS = {
    "layers in a list and a dict": (Held, Convolutions),
    "a sum in place": (AddingInPlace, Adding),
    "inputs in place": (ScalingInPlace, Scaling),
    "train returns nothing": (Silent, Convolutions),
    "a type that is insisted on": (Insisting, Convolutions),
    "a sparse buffer": (Sparse, Convolutions),
}


@pytest.mark.parametrize("method", ["rtn", "qdrop", "pd_quant"])
@pytest.mark.parametrize(("written", "plain"), PAIRS.values(), ids=PAIRS)
def test_the_same_network_written_in_another_way(written, plain, method):
    x, fresh, options = images(32), images(16, seed=2), {"method": method, "w_bits": 4, "a_bits": 4, "iters": 5}
    made = []
    for model in (written(), plain()):
        model.eval()
        made.append(quantize(model, x, batch_size=8, **options))
    assert set(summarize(made[0]).floating_point.unquantized) <= {"flat", "matmul in Sparse"}  # flat is not called
    outputs, expected = (network(fresh.clone()) for network in made)
    assert (outputs - expected).norm() < 0.02 * expected.norm()


class Blocks(nn.Module):
    """Residual blocks, called with nothing but a tensor."""

    class Block(nn.Module):
        def __init__(self, share) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(6)
            self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
            self.share = share

        def forward(self, x, share=None, size=None):
            x = x.pop() if isinstance(x, list) else x
            share = self.share if share is None else share
            out = x + share * self.second(F.relu(self.norm(self.first(x))))
            return out if size is None else out / (size.numel() / 36)

    def __init__(self, shares=(0.5, 1.5, 2.0)) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
            self.blocks = nn.ModuleList([self.Block(share) for share in shares])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(x).mean((2, 3)))


class BlocksWithConstants(Blocks):
    """The same network where the constants come from its calls."""

    def __init__(self) -> None:
        super().__init__(shares=(9.0, 9.0, 9.0))

    def forward(self, x):
        first, second, third = self.blocks
        x = self.stem(x)
        x = first(x, 0.5, size=x.shape[2:])
        x = third(x=second(share=1.5, x=x), share=2.0)
        return self.head(F.relu(x).mean((2, 3)))


@pytest.mark.parametrize("method", ["rtn", "adaround", "brecq", "qdrop", "pd_quant"])
def test_blocks_called_with_constants_are_those_called_without(method):
    x, fresh, options = images(32), images(16, seed=2), {"method": method, "w_bits": 4, "a_bits": 4, "iters": 5}
    made, plain = (quantize(kind().eval(), x, batch_size=8, **options) for kind in (BlocksWithConstants, Blocks))
    for (name, tensor), (other_name, other) in zip(made.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(tensor, other), name
    assert torch.equal(made(fresh), plain(fresh))
    assert torch.equal(torch.fx.symbolic_trace(plain)(fresh), plain(fresh))


class Varying(Blocks):
    """Its blocks get what differs from batch to batch, or what they write into."""

    def __init__(self, how) -> None:
        super().__init__()
        self.how = how

    def forward(self, x):
        x = self.stem(x)
        given = {"images": 1 + len(x) / 1e4, "content": x.mean().item()}
        for block in self.blocks:
            x = block([x]) if self.how == "written" else block(x, given[self.how])
        return self.head(F.relu(x).mean((2, 3)))


@pytest.mark.parametrize("method", ["adaround", "brecq", "qdrop"])
@pytest.mark.parametrize("how", ["images", "content", "written"])
def test_blocks_called_with_what_varies_are_no_blocks_and_quantized_as_they_run(how, method, caplog):
    network = Varying(how).eval()
    with caplog.at_level("INFO", "baselines"):
        made = quantize(network, images(32), method=method, w_bits=8, a_bits=8, iters=3, batch_size=8)
    assert method == "adaround" or "8 units, 0 of them blocks" in caplog.text
    fresh = images(16, seed=2)
    assert (made(fresh) - network(fresh)).norm() < 0.05 * network(fresh).norm()


class Late(Blocks):
    """Its constants are those of the first images until a brighter one comes."""

    def forward(self, x):
        bright, x = bool(x.max() > 50), self.stem(x)
        for block in self.blocks:
            x = block(x, 1.0 + bright)
        return self.head(F.relu(x).mean((2, 3)))


@pytest.mark.parametrize("method", ["adaround", "brecq"])
def test_constants_that_change_later_are_a_clear_error(method):
    x, options = images(32), {"method": method, "w_bits": 8, "a_bits": 8, "iters": 3, "batch_size": 8}
    x[30] *= 100
    with pytest.raises(ValueError, match=r"blocks\.0 \(Block\) is called with other arguments for some calib"):
        quantize(Late().eval(), x, **options)
    assert quantize(Late().eval(), x, blocks=[], **options)(x).isfinite().all()


def test_rounding_takes_networks_of_one_image_at_a_time():
    class One(Blocks):
        def forward(self, x):
            assert len(x) == 1
            return super().forward(x)

    network, x = One().eval(), images(1)
    made = quantize(network, x, method="rtn", w_bits=8, a_bits=8)
    assert (made(x) - network(x)).norm() < 0.05 * network(x).norm()


@pytest.mark.parametrize("method", ["rtn", "brecq", "qdrop", "pd_quant"])
def test_views_of_what_convolutions_give(method):
    """They need the usual order of axes; with the faster one the same draws fall on other elements."""
    x, fresh = images(32), images(16, seed=2)
    network = quantize(Viewing().eval(), x, method=method, w_bits=8, a_bits=8, iters=3, batch_size=8)
    expected = Flattening()(fresh)
    assert (network(fresh) - expected).norm() < 0.05 * expected.norm()


def test_images_of_the_user_and_those_that_are_kept_stay():
    x = images(16)
    before = x.clone()
    quantize(ScalingInPlace().eval(), x, method="qdrop", iters=2, batch_size=8)
    assert torch.equal(x, before)


def test_a_function_over_the_network_itself_is_refused_and_nothing_is_touched():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)).train()
    plain = model[1].forward
    model[1].forward = lambda x: 2 * plain(x)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="forward of 1 was replaced by a function over modules of the network itself"):
        quantize(model, images(16), method="rtn")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert model[1].training


class Dropped(nn.Module):
    def forward(self, weight):
        return F.dropout(weight, 0.5, self.training)


def test_weights_are_those_of_evaluation_also_of_a_model_in_training_mode():
    model = Convolutions()
    parametrize.register_parametrization(model.first, "weight", Dropped())
    x = images(8)
    network = quantize(model.train(), x, method="rtn", w_bits=32, a_bits=32)
    torch.testing.assert_close(network(x), model.eval()(x))


class OfIntegers(nn.Module):
    """A block that reads pixels as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)

    def forward(self, x):
        return self.second(F.relu(self.first(x.float() / 255)))


@pytest.mark.parametrize("method", ["brecq", "qdrop", "pd_quant"])
def test_blocks_that_read_integers(method):
    torch.manual_seed(0)
    model = nn.Sequential(
        OfIntegers(), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    ).eval()
    x = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8)
    network = quantize(model, x, method=method, w_bits=8, a_bits=8, iters=3, batch_size=8)
    expected = model(x)
    assert (network(x) - expected).norm() < 0.05 * expected.norm()


def test_loaders_may_fill_one_buffer_anew():
    buffer = torch.zeros(2, 3)

    def loader():
        for value in range(3):
            yield buffer.fill_(value)

    assert gather_inputs(loader())[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


class Padded(nn.Module):
    """Sequences whose zeros are padding."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(12, 16), body, nn.Linear(16, 5)

    def forward(self, x):
        known = (x != 0).any(-1)
        return self.head((self.body(self.embed(x), known) * known[..., None]).sum(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

    def forward(self, x, known):
        return self.layers(x, src_key_padding_mask=~known)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x, known):
        allowed = known[:, :, None] & known[:, None]
        return x + F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), attn_mask=allowed)


@pytest.mark.parametrize("calibrated_on", ["padded", "whole"])
@pytest.mark.parametrize("body", [Encoder, Attention])
@torch.no_grad()
def test_sequences_with_padding(body, calibrated_on):
    """Rows of attention that nothing is allowed for, too, of which calibration may have shown none."""
    torch.manual_seed(0)
    model, x = Padded(body()).eval(), torch.randn(32, 6, 12)
    padded = x.clone()
    padded[::2, 4:] = 0
    calibration = padded if calibrated_on == "padded" else x
    network = quantize(model, calibration, method="rtn", w_bits=8, a_bits=8)
    expected = model(padded)
    assert (network(padded) - expected).norm() < 0.05 * expected.norm()


class Blocked(Attention):
    def forward(self, x):
        known = torch.ones(x.shape[:2], dtype=torch.bool)
        known[:, 4:] = False
        return super().forward(x, known)


@pytest.mark.parametrize("method", ["brecq", "qdrop"])
def test_blocked_rows_of_attention_have_gradients(method):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(12, 16), Blocked(), nn.Flatten(), nn.Linear(96, 5)).eval(),
        torch.randn(32, 6, 12),
    )
    network = quantize(model, x, method=method, w_bits=8, a_bits=8, iters=3, batch_size=8, blocks=["1"])
    assert network(x).isfinite().all()


def test_closures_over_no_module_are_taken_as_they_are():
    model, shape, later = Convolutions().eval(), [2, 3], None

    def forward(x):
        return x.relu().mean(shape) if later is None else x

    model.pool = nn.Identity()
    model.pool.forward = forward
    model.forward = MethodType(lambda self, x: self.head(self.pool(self.second(F.relu(self.first(x))))), model)
    quantize(model, images(16), method="rtn")


def test_a_function_bound_by_the_user_stays():
    def forward(self, x):
        return 3 * nn.Conv2d.forward(self, x)

    model = Convolutions().eval()
    model.tripled = MethodType(forward, model.first)
    model.forward = MethodType(lambda self, x: self.head(F.relu(self.tripled(x) + self.first(x)).mean((2, 3))), model)
    x = images(16)
    network, expected = quantize(model, x, method="rtn", w_bits=8, a_bits=8), model(x)
    assert (network(x) - expected).norm() < 0.05 * expected.norm()
