import pytest
import torch

from baselines.capture import Cached, CachePlan, Stream, gather_inputs
from baselines.convert import folded_copy
from baselines.trace import trace
from baselines.units import find_blocks, find_units

from .networks import Brightness, LongSkip, SmallResNet, Windows, images, randomized

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


X = images(5)


@pytest.mark.parametrize(
    "loader",
    [X, [X[:2], X[2:]], [(X[:4], torch.zeros(4)), (X[4:], torch.zeros(1))], [{"image": X, "label": torch.zeros(5)}]],
    ids=["stacked", "tensors", "tuples", "dict"],
)
def test_all_forms_of_loaders_give_all_inputs(loader):
    assert torch.equal(gather_inputs(loader), X)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader is empty"),
        (X[:0], "set is empty"),
        ([{"label": X}], "dict with keys"),
        (["abc"], "calibration batch is a str"),
        ([torch.full((2, 3, 4, 4), float("nan"))], "2 of 2 calibration inputs"),
    ],
)
def test_unusable_loaders_are_errors(loader, message):
    with pytest.raises(ValueError, match=message):
        gather_inputs(loader)


def test_unit_that_some_batches_do_not_reach_is_a_clear_error():
    inputs = torch.cat([images(8), images(4) + 5])
    with pytest.raises(ValueError, match=r"dark \(Conv2d\) was reached by 2 of 3 calibration batches"):
        walk(randomized(Brightness()), inputs)
