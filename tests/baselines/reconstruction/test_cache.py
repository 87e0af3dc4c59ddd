import weakref

import pytest
import torch
from torchvision.models.resnet import BasicBlock

from baselines import quantize
from baselines.api import _cache_plan
from baselines.network.batch_norm_folding import folded_copy
from baselines.network.blocks import find_blocks
from baselines.network.trace import trace
from baselines.network.units import find_units
from baselines.recipes import RECIPES
from baselines.reconstruction.cache import Cached, CachePlan, log_cache_size

from ..networks import SmallResNet, images, randomized

CPU = torch.device("cpu")

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
