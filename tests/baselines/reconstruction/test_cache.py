import weakref

import pytest
import torch
from torchvision.models.resnet import BasicBlock

from baselines import quantize
from baselines.api import _cache_plan
from baselines.network.folding import folded_copy
from baselines.network.trace import trace
from baselines.network.units import find_blocks, find_units
from baselines.recipes import RECIPES
from baselines.reconstruction.cache import Cached, CachePlan, Stream, log_cache_size

from ..networks import Brightness, LongSkip, SmallResNet, Windows, images, randomized

CPU = torch.device("cpu")


def walk(model, inputs, batch_size=4, kind="block"):
    """Each unit's input and output as the stream gives them, and how often each unit ran."""
    record = trace(model, inputs[:1])
    units = find_units(model, record, find_blocks(model, record), kind)
    counts = dict.fromkeys((u.name for u in units), 0)
    stream = Stream(model, Cached(inputs, CachePlan(CPU, None, CPU)), batch_size)
    seen = {}

    def count(name):
        def hook(module, args):
            if "forward" not in vars(module):  # a replayed unit has its forward replaced
                counts[name] += 1

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in counts]
    for unit in units:
        arrived = stream.arrive(unit)
        seen[unit.name] = arrived.tensor, stream.leave(unit, arrived).tensor
    for handle in handles:
        handle.remove()
    return seen, counts


def by_hooks(model, inputs, names):
    """The same by one full forward pass with hooks."""
    seen, handles = {}, []
    for name in names:

        def hook(module, args, output, name=name):
            seen[name] = args[0].clone(), output.clone()

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", ["block", "layer"])
@pytest.mark.parametrize("network", [SmallResNet, LongSkip, Windows], ids=["chain", "long-skip", "windows"])
@pytest.mark.parametrize("count", [8, 7, 3])
def test_stream_equals_a_full_pass_with_hooks(network, count, kind):
    model = folded_copy(randomized(network()), images(2))
    seen, _ = walk(model, images(count), kind=kind)
    expected = by_hooks(model, images(count), list(seen))
    for name, pair in seen.items():
        for mine, theirs in zip(pair, expected[name], strict=True):
            torch.testing.assert_close(mine, theirs, msg=name)


@pytest.mark.parametrize(("kind", "units"), [("block", 4), ("layer", 7)])
def test_every_unit_of_a_chain_of_blocks_runs_once_a_batch(kind, units):
    model = folded_copy(randomized(SmallResNet()), images(2))
    _, counts = walk(model, images(10), batch_size=4, kind=kind)
    assert list(counts.values()) == [3] * units


def test_modules_are_as_before_after_a_walk():
    model = folded_copy(randomized(SmallResNet()), images(2))
    before = model(images(3))
    walk(model, images(5))
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(model(images(3)), before)


def test_unit_that_some_batches_do_not_reach_is_a_clear_error():
    inputs = torch.cat([images(8), images(4) + 5])
    with pytest.raises(ValueError, match=r"dark \(Conv2d\) was reached by 2 of 3 calibration batches"):
        walk(randomized(Brightness()), inputs)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "flat": lambda x: x.flatten(1),
    "numbers": lambda x: (x * 100).long(),
}


@pytest.mark.parametrize("arrange", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_cached_comes_back_in_any_order_and_layout(arrange, dtype):
    x = arrange(images(7))
    cached = Cached.collect(x.split(3), 7, CachePlan(CPU, dtype, CPU))
    rounded = x if dtype is None or not x.is_floating_point() else x.to(dtype).to(x.dtype)
    chosen = torch.tensor([6, 0, 0, 3])
    assert torch.equal(cached.rows(chosen), rounded[chosen])
    assert torch.equal(torch.cat(list(cached.batches(2))), rounded)
    assert cached.rows(chosen).dtype == cached.batch(0, 1).dtype == x.dtype
    assert cached.tensor.dtype == (dtype if dtype and x.is_floating_point() else x.dtype)
    assert cached.rows(torch.arange(7)).stride() == x.stride()
    cached.batch(0, 7).zero_()
    cached.rows(torch.arange(7)).zero_()
    assert torch.equal(cached.batch(0, 7), rounded)


class Watched:
    """How many caches of unit data there are at once, and how many bytes; the calibration images do not count."""

    def __init__(self, monkeypatch):
        self.most = self.most_bytes = 0
        self._alive = weakref.WeakSet()
        real = Cached.collect.__func__

        def collect(cls, *args):
            kept = real(cls, *args)
            self._alive.add(kept)
            self.most = max(self.most, len(self._alive))
            storages = {c.tensor.untyped_storage().data_ptr(): c.tensor.untyped_storage().nbytes() for c in self._alive}
            self.most_bytes = max(self.most_bytes, sum(storages.values()))
            return kept

        monkeypatch.setattr(Cached, "collect", classmethod(collect))


@pytest.mark.parametrize("cache_dtype", [None, torch.float16])
@pytest.mark.parametrize("method", ["qdrop", "brecq"])
def test_cache_holds_inputs_and_outputs_of_two_units_and_no_more_bytes_than_was_logged(
    monkeypatch, caplog, method, cache_dtype
):
    watched = Watched(monkeypatch)
    model = torch.nn.Sequential(*(torch.nn.Sequential(BasicBlock(3, 3), BasicBlock(3, 3)) for _ in range(3)))
    model = randomized(torch.nn.Sequential(model, torch.nn.Flatten(), torch.nn.Linear(3 * 64, 5)))
    with caplog.at_level("INFO", logger="baselines"):
        quantize(model, images(1024), method=method, iters=2, cache_dtype=cache_dtype)
    # Both inputs and the FP output while a unit is worked on; then both outputs with one input of this or the next.
    assert watched.most == 3
    assert watched.most_bytes == 3 * 1024 * 3 * 8 * 8 * (2 if cache_dtype else 4)
    assert f"cache: up to {'1.1' if cache_dtype else '2.2'} MiB on cpu for 1024 images" in caplog.text


def cache_size(kind, count, method):
    model = folded_copy(randomized(SmallResNet()), images(2))
    record = trace(model, images(2))
    units = find_units(model, record, find_blocks(model, record), kind)
    return log_cache_size(units, record, count, CachePlan(CPU, None, CPU), RECIPES[method])


def test_size_of_the_cache_by_hand(caplog):
    with caplog.at_level("INFO", logger="baselines"):
        size = cache_size("block", 1000, "qdrop")
    # layer1.0 has 8 channels of 8x8 in and out, once in both networks and once in one; conv1 no more: 3 channels in,
    # 8 out, these before and behind the ReLU.
    assert size == 1000 * 4 * 3 * 512
    expected = "up to 5.9 MiB on cpu for 1000 images; the largest unit is conv1, input 0.7 MiB and output 2.0 MiB"
    assert expected in caplog.text


@pytest.mark.parametrize("method", ["qdrop", "adaround", "pd_quant"])
def test_no_more_is_cached_than_was_announced(monkeypatch, method):
    """Also layer by layer, where shortcuts keep the outputs in a block until it has been left."""
    watched = Watched(monkeypatch)
    quantize(randomized(SmallResNet()), images(128), method=method, iters=1)
    size = cache_size("layer" if method == "adaround" else "block", 128, method)
    assert 0.5 * size < watched.most_bytes <= size


class Alive:
    """How many of the tensors that functions made were there at once."""

    def __init__(self):
        self.made = self.most = 0
        self._alive = []

    def __call__(self, function):
        def watched(*args, **kwargs):
            tensor = function(*args, **kwargs)
            self._alive = [reference for reference in self._alive if reference() is not None] + [weakref.ref(tensor)]
            self.made, self.most = self.made + 1, max(self.most, len(self._alive))
            return tensor

        return watched


@pytest.mark.parametrize("method", ["qdrop", "pd_quant"])
def test_what_stands_for_outputs_of_passed_units_is_not_there_all_at_once(monkeypatch, method):
    alive = Alive()
    for place, name in ((torch, "full"), (torch.Tensor, "new_full"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(place, name, alive(getattr(place, name)))
    layers = [layer for _ in range(6) for layer in (torch.nn.Conv2d(3, 3, 1), torch.nn.ReLU())]
    model = randomized(torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(192, 5)))
    quantize(model, images(40), method=method, iters=2)
    assert alive.made >= 30 and alive.most <= 2


def test_replay_keeps_the_type_of_the_network():
    class Steps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (torch.nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x):
            return self.d(self.b(self.c(self.c(self.a(x)))))  # c is no unit: it gets what stands for a's output

    model, inputs = randomized(Steps()).double(), images(8).double()
    seen, _ = walk(model, inputs)
    assert list(seen) == ["a", "b", "d"]
    torch.testing.assert_close(seen["d"][1], model(inputs))


def test_batches_of_even_size_hold_every_image_once():
    cached = Cached(images(10), CachePlan(CPU, None, CPU))
    parts = list(cached.even_batches(4))
    assert [len(part) for part in parts] == [3, 3, 4]
    assert torch.equal(torch.cat(parts), images(10))


def test_place_of_the_cache_does_not_matter_and_its_precision_little():
    def outputs(**options):
        options = {"method": "qdrop", "w_bits": 4, "a_bits": 8, "iters": 60, "batch_size": 16} | options
        return quantize(randomized(SmallResNet()), images(40), **options)(images(40))

    whole, half = outputs(), outputs(cache_dtype=torch.float16)
    assert torch.equal(outputs(cache_device="cpu"), whole)
    expected = randomized(SmallResNet())(images(40))
    errors = [(each - expected).abs().mean() for each in (whole, half, outputs(method="rtn"))]
    assert not torch.equal(half, whole)
    assert errors[0] < errors[2] and errors[1] < 0.8 * errors[2]


def test_cache_lies_in_its_place_and_hands_out_where_the_networks_are():
    meta = torch.device("meta")
    kept = Cached.collect(images(4).split(2), 4, CachePlan(meta, None, CPU))
    assert kept.tensor.device == meta
    given = Cached(images(4), CachePlan(CPU, None, meta))
    assert given.tensor.device == CPU
    assert {given.batch(0, 2).device, given.rows(torch.arange(2)).device} == {meta}


@pytest.mark.parametrize(("name", "kept_on"), [("model", "meta"), ("cpu", "cpu")])
def test_place_of_the_cache_is_as_asked(name, kept_on):
    plan = _cache_plan(name, None, torch.device("meta"))
    assert (plan.device.type, plan.compute_device.type) == (kept_on, "meta")


def test_values_that_half_precision_cannot_hold_are_a_clear_error():
    model = randomized(SmallResNet())
    model.bn1.weight.data.mul_(1e6)
    with pytest.raises(OverflowError, match="beyond 65504 do not fit a cache of float16"):
        quantize(model, images(40), iters=1, cache_dtype=torch.float16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_device": "gpu"}, "cache_device='gpu' should be one of model, cpu"),
        (
            {"cache_dtype": torch.int8},
            r"cache_dtype=torch\.int8 should be None or one of torch\.float16, torch\.bfloat16",
        ),
    ],
)
def test_unknown_caches_are_clear_errors(options, message):
    with pytest.raises(ValueError, match=message):
        quantize(randomized(SmallResNet()), images(40), **options)
