import weakref

import pytest
import torch

from baselines import quantize
from baselines.network.batch_norm_folding import folded_copy
from baselines.network.blocks import find_blocks
from baselines.network.trace import trace
from baselines.network.units import find_units
from baselines.reconstruction.cache import Cached, CachePlan
from baselines.reconstruction.streams import Stream

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
