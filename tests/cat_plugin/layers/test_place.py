import io

import pytest
import torch
from torch import nn

from cat_plugin import CATError
from cat_plugin.fitting.processes import ALONE
from cat_plugin.layers.place import SMALLEST_SPREAD, candidates, check_named, measuring, places


class TransposedLinear(nn.Module):
    """As the `Conv1D` of transformers: the weight is (inputs, outputs)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return x @ self.weight


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)


class Groups(nn.Linear):
    """Weights of integers with a scale for every two inputs."""

    def __init__(self):
        super().__init__(4, 6)
        scale = self.weight.detach().view(6, 2, 2).abs().amax(2, keepdim=True)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero_point", torch.zeros_like(scale))


KINDS = {
    "conv1d": (nn.Conv1d(3, 6, 2), (3, 9), -2, 6),
    "conv2d": (nn.Conv2d(3, 6, 2), (3, 9, 8), -3, 6),
    "conv2d as high as it has channels": (nn.Conv2d(3, 6, 3), (3, 8, 8), -3, 6),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (6, 9, 8), -3, 6),
    "transposed": (nn.ConvTranspose2d(3, 6, 2), (3, 4, 4), -3, 6),
    "conv3d": (nn.Conv3d(3, 6, 2), (3, 4, 5, 6), -4, 6),
    "linear": (nn.Linear(4, 6), (4,), -1, 6),
    "linear on a sequence": (nn.Linear(4, 6), (7, 4), -1, 6),
    "linear on a sequence as long as it has channels": (nn.Linear(4, 6), (6, 4), -1, 6),
    "linear on a map": (nn.Linear(4, 6), (5, 3, 4), -1, 6),
    "transposed linear": (TransposedLinear(), (7, 4), -1, 6),
    "linear with scales of groups": (Groups(), (7, 4), -1, 6),
    "attention": (Attention(4, 2, batch_first=True), (7, 4), -1, 4),
    "block of convolutions": (nn.Sequential(nn.Conv2d(3, 6, 2), nn.ReLU()), (3, 9, 8), -3, 6),
    "norm": (nn.BatchNorm2d(3), (3, 9, 8), -3, 3),
    "relu": (nn.ReLU(), (7, 4), -1, 4),
}


def found(layers, run, model=None):
    with measuring(layers) as measures, torch.no_grad():
        run()
    return places(measures, ALONE)


@pytest.mark.parametrize(("layer", "shape", "axis", "channels"), KINDS.values(), ids=KINDS)
def test_axis_and_spread_of_channels(layer, shape, axis, channels):
    batches = [torch.randn(size, *shape) for size in (5, 1, 2)]
    with torch.no_grad():
        outputs = [layer(batch) for batch in batches]
    outputs = torch.cat([output[0] if isinstance(output, tuple) else output for output in outputs])
    (place,) = found({"it": layer}, lambda: [layer(batch) for batch in batches])
    assert (place.axis, place.channels, place.numbers) == (axis, channels, outputs[0].numel())
    for channel in range(channels):
        spread = outputs.select(axis, channel).double().std(correction=0).item()
        assert place.spread[channel].item() == pytest.approx(max(spread, SMALLEST_SPREAD * place.spread.mean().item()))


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.bag = nn.Embedding(9, 4), nn.EmbeddingBag(9, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))
        self.script = torch.jit.script(nn.Linear(4, 4))
        self.compiled = torch.compile(nn.Linear(4, 4), backend="eager")
        self.unused = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.dead = nn.Linear(4, 4)
        nn.init.zeros_(self.dead.weight)

    def forward(self, x):
        x = self.embedding(x) + self.bag(x).unsqueeze(1)
        x = self.block(self.lstm(x)[0])
        x = self.compiled(self.script(x)) + self.dead(x)
        return self.attention(x, x, x)[0].mean(dim=1)


@pytest.mark.filterwarnings("ignore")
def test_what_is_left_out():
    torch.manual_seed(0)  # a few seeds give an attention whose outputs are all alike
    model = Everything().eval()
    layers = candidates(model, "all")
    assert {"block.0", "unused", "attention", "dead"} <= set(layers)
    assert not {name for name in layers if name.startswith(("embedding", "bag", "lstm", "script", "compiled"))}
    made = found(layers, lambda: model(torch.randint(9, (3, 5))))
    assert [place.name for place in made] == ["block.0", "attention"]  # the others did not run, or give one number


def test_containers_stand_before_the_names():
    assert set(candidates(nn.DataParallel(nn.Sequential(nn.Linear(2, 2))), "all")) == {"module.0"}
    assert candidates(torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager"), "all") == {}


def test_names_say_which():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    assert candidates(model, ("2", "1")) == {"2": model[2], "1": model[1]}


def test_a_name_that_there_is_not():
    with pytest.raises(CATError, match="'3' is no layer of Sequential; its children are 0"):
        candidates(nn.Sequential(nn.Linear(2, 3)), ("0", "3"))


class Words(nn.Module):
    """Gives what no correction can be made of."""

    def __init__(self, what):
        super().__init__()
        self.what, self.times = what, 0

    def forward(self, x):
        self.times += 1
        return {
            "text": "a",
            "integers": x.long(),
            "one axis": x[0],
            "nothing": None,
            "not finite": x / 0,
            "other channels": x[:, : self.times],
        }[self.what]


@pytest.mark.parametrize("what", ["text", "integers", "one axis", "nothing", "not finite", "other channels"])
def test_layers_that_were_named_and_cannot_be_corrected(what):
    layer, other = Words(what), nn.Linear(4, 4)
    made = found({"layer": layer, "other": other}, lambda: [(layer(other(torch.ones(2, 4) * s))) for s in (1, 2)])
    assert [place.name for place in made] == ["other"]
    check_named("all", made)
    check_named(("other",), made)
    with pytest.raises(
        CATError, match="layer 'layer' gives no floating-point tensor with channels, always of one kind"
    ):
        check_named(("other", "layer"), made)


def torchscript():
    """A layer as it comes from a file, which takes no hooks."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), file)
    file.seek(0)
    return torch.jit.load(file)


def test_hooks_are_gone_also_after_an_error():
    layer = nn.Linear(2, 2)
    with pytest.raises(KeyError), measuring({"it": layer}):
        raise KeyError
    assert not layer._forward_hooks
    with pytest.raises(RuntimeError), measuring({"it": layer, "compiled": torchscript()}):
        pass
    assert not layer._forward_hooks


def test_torchscript_cannot_be_named():
    model = nn.Sequential(nn.Linear(2, 2), torchscript())
    assert list(candidates(model, "all")) == ["0"]
    with pytest.raises(CATError, match="layer '1' is TorchScript, which takes no hooks"):
        candidates(model, ("0", "1"))


def test_sequences_of_several_lengths_are_measured_without_padding():
    layer, parts = nn.Linear(4, 3), [torch.randn(length, 4) for length in (5, 2, 7)]
    with torch.no_grad():
        (nested,) = found({"it": layer}, lambda: layer(torch.nested.as_nested_tensor(parts)))
        values = layer(torch.cat(parts)).double()
    assert (nested.axis, nested.numbers) == (-1, 7 * 3)
    torch.testing.assert_close(nested.spread, values.std(dim=0, correction=0).float())


def test_channels_of_several_processes_are_measured_together():
    """A stand-in for two processes: sums are those of both."""
    layer, halves = nn.Linear(3, 4), torch.randn(2, 8, 3)
    (whole,) = found({"it": layer}, lambda: layer(halves.flatten(0, 1)))
    measures = []
    for half in halves:
        with measuring({"it": layer}) as each, torch.no_grad():
            layer(half)
        measures.append(each)

    class Two:
        def gather(self, value):
            return [{}, value]  # the first one had no images

        def sum(self, values):
            return values + measures[1]["it"].sums

    (place,) = places(measures[0], Two())
    torch.testing.assert_close(place.spread, whole.spread)
