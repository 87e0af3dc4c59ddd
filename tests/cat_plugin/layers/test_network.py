import pytest
import torch
from torch import nn

from cat_plugin.fitting.processes import ALONE
from cat_plugin.layers.gradients import fitting_through
from cat_plugin.layers.network import CorrectedNetwork
from cat_plugin.layers.place import candidates, measuring, places
from tests.cat_plugin.helpers import state_of
from tests.cat_plugin.layers.networks import kept_images, pictures, planted


def made(model, x, **options):
    """The network of `model`, with places as images `x` give them, and a part that is these images."""
    layers = candidates(model, "all")
    with measuring(layers) as measures, torch.no_grad():
        model(x)
    (part,) = kept_images([x]).parts(torch.arange(len(x)))
    return CorrectedNetwork(model, layers, places(measures, ALONE), **options), part


def random_vector(network, seed=0):
    return 0.3 * torch.randn(network.size, generator=torch.Generator().manual_seed(seed))


def corrected():
    """A model, images, its network with a vector, and the rows with the corrections of that."""
    model, x = planted()[0], pictures(12)
    network, part = made(model, x)
    vector = random_vector(network)
    with torch.no_grad(), network.attached():
        return model, x, network, vector, network.rows(part, vector)


def test_equals_corrections_by_hand():
    """Scales come before offsets in the vector, each in the order of the layers; offsets are in spreads."""
    model, x, network, vector, found = corrected()
    spreads, at, hidden = {place.name: place.spread for place in network.places}, 0, x
    half = network.size // 2
    with torch.no_grad():
        for name, quantizer in (("first", model.rounded), ("second", model.rounded_again), ("last", None)):
            hidden = getattr(model, name)(hidden if name != "last" else hidden.amax(dim=(2, 3)))
            channels = hidden.shape[1]
            shape = (1, -1, *[1] * (hidden.ndim - 2))
            scale, offset = 1 + vector[at : at + channels], vector[half + at : half + at + channels] * spreads[name]
            hidden = hidden * scale.view(shape) + offset.view(shape)
            hidden = hidden if quantizer is None else quantizer(torch.relu(hidden))
            at += channels
    torch.testing.assert_close(found, hidden)


def test_as_modules_they_do_the_same():
    model, x, network, vector, expected = corrected()
    for name, correction in network.corrections(vector).items():
        getattr(model, name).register_forward_hook(lambda module, args, out, change=correction: change(out))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("fails", [False, True], ids=["normal", "raises"])
def test_the_model_is_as_it_was(fails):
    model, x = planted()[0], pictures(12)
    network, part = made(model, x)
    before, plain = state_of(model), model(x)
    try:
        with network.attached():
            assert torch.equal(network.rows(part, torch.zeros(network.size)), plain)
            assert torch.equal(network.rows(part, None), plain)
            network.rows(part, random_vector(network))
            assert torch.equal(model(x), plain)  # the hooks act within rows() only
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert state_of(model) == before


def test_an_error_within_leaves_no_correction_on():
    model, x = planted()[0], pictures(12)
    network, part = made(model, x, forward_fn=lambda model, batch: (model(batch), 1 / 0))
    with network.attached():
        with pytest.raises(ZeroDivisionError):
            network.rows(part, random_vector(network))
        assert torch.equal(model(x), planted()[0](x))


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.cut, self.again, self.last = nn.Linear(192, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.again(self.cut(x.flatten(1)).detach())
        return {"logits": self.last(hidden), "other": hidden}


def test_which_layers_a_gradient_reaches():
    model = Cut()
    network, part = made(model, pictures(6), output="logits")
    vector = torch.zeros(network.size, requires_grad=True)
    with fitting_through(model), network.attached():
        (gradient,) = torch.autograd.grad(network.rows(part, vector).square().sum(), vector)
    assert [place.name for place in network.places] == ["cut", "again", "last"]
    assert network.reached(gradient) == [False, True, True]
    assert network.reached(None) == [False, False, False]


def test_large_outputs_come_in_few_images_at_once(monkeypatch):
    """Of 4 MB an image, 4 images are 16 MB, for each thread; small ones come 32 at once."""
    threads = 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    small = nn.Sequential(nn.Conv2d(3, 4, 1))
    large = nn.Sequential(nn.Conv2d(3, 64, 1))
    assert made(small, torch.randn(2, 3, 8, 8))[0].at_once == 32
    assert made(large, torch.randn(1, 3, 128, 128))[0].at_once == 4
    assert made(large, torch.randn(1, 3, 300, 300))[0].at_once == 1
    threads = 3
    assert made(large, torch.randn(1, 3, 128, 128))[0].at_once == 12


class Ordered(torch.autograd.Function):
    """Reads memory in its order, as kernels of one's own may, in one direction or the other."""

    @staticmethod
    def forward(ctx, x, how):
        ctx.how = how
        return x.as_strided(x.shape, x.contiguous().stride()).clone() if how == "reads memory" else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad.view(-1).view(grad.shape) if ctx.how == "views backward" else grad), None


class Picky(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.last, self.how = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 8, 1), nn.Linear(8, 2), how
        self.seen = []

    def forward(self, x):
        self.seen.append(x.is_contiguous())
        hidden = Ordered.apply(self.first(x), self.how)
        assert self.how != "asserts" or hidden.is_contiguous()
        hidden = hidden.view(len(x), -1).view(hidden.shape) if self.how == "views" else hidden
        return self.last(self.second(hidden).relu().mean(dim=(2, 3)))


@pytest.mark.parametrize("how", ["any order", "views", "asserts", "reads memory", "views backward"])
def test_large_images_have_their_channels_last_where_the_model_takes_that(how, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    torch.manual_seed(0)
    model, x = Picky(how), torch.randn(2, 3, 128, 128)
    network, part = made(model, x)

    def gradient():
        vector = torch.zeros(network.size, requires_grad=True)
        return torch.autograd.grad(network.rows(part, vector).square().sum(), vector)[0]

    with network.attached():
        expected = gradient()
        network.arrange(gradient)
        model.seen.clear()
        torch.testing.assert_close(gradient(), expected, rtol=1e-3, atol=1e-4)
    assert model.seen == [how != "any order"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_types_of_models_are_kept(dtype):
    model, x = planted()[0].to(dtype), pictures(4).to(dtype)
    network, part = made(model, x)
    with torch.no_grad(), network.attached():
        assert network.rows(part, random_vector(network)).dtype == dtype
        assert torch.equal(network.rows(part, torch.zeros(network.size)), model(x))
