import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from baselines import quantize
from baselines.inputs import check_network, gather_inputs, whole_number

from .networks import SmallResNet, images, randomized

X = images(5)


@pytest.mark.parametrize(
    "loader",
    [
        X,
        [X[:2], X[2:]],
        [(X[:4], torch.zeros(4)), (X[4:], torch.zeros(1))],
        [{"image": X, "label": torch.zeros(5)}],
        [[{"data": X[:2], "label": torch.zeros(2, 1)}], [{"data": x[None], "label": torch.zeros(1, 1)} for x in X[2:]]],
    ],
    ids=["stacked", "tensors", "tuples", "dict", "lists of dicts"],
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
        (torch.tensor(1.0), r"tensor without axes; expected \(N, ...\)"),
        ([torch.tensor(1.0)], r"batches of shapes \[\(\)\]; expected \(n, ...\)"),
        ([X, images(2, size=9)], r"of shapes \[\(2, 3, 9, 9\), \(5, 3, 8, 8\)\]; .* of one shape: resize"),
    ],
)
def test_unusable_loaders_are_errors(loader, message):
    with pytest.raises(ValueError, match=message):
        gather_inputs(loader)


def test_endless_loaders_are_an_error(monkeypatch):
    monkeypatch.setattr("baselines.inputs._MOST_INPUTS", 20)
    with pytest.raises(ValueError, match="has no length and has given more than 20 inputs; if it is endless, cut it"):
        gather_inputs(itertools.cycle([X]))
    assert len(gather_inputs(itertools.islice(itertools.cycle([X]), 4))) == 20
    assert len(gather_inputs([X] * 6)) == 30  # which has a length


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (None, r"calib_loader=None should be a tensor \(N, ...\) or an iterable of batches"),
        (3, "calib_loader=3 should be"),
        ("images/", "calib_loader='images/' should be a tensor"),
        (np.zeros((2, 3)), r"a NumPy array; expected a tensor: torch.from_numpy\(images\)"),
        (TensorDataset(X, torch.zeros(5)), "is a TensorDataset, which gives single inputs; wrap it in a DataLoader"),
    ],
    ids=["none", "number", "path", "array", "dataset"],
)
def test_what_is_no_loader_is_an_error(loader, message):
    with pytest.raises(TypeError, match=message):
        quantize(randomized(SmallResNet()), loader)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conv1.weight", torch.nan),
        ("layer1.0.bn1.bias", torch.inf),
        ("layer1.0.bn2.running_mean", torch.nan),
        ("fc.bias", -torch.inf),
    ],
)
@pytest.mark.parametrize("method", ["rtn", "qdrop"])
def test_values_of_the_network_that_are_not_finite_are_named(name, value, method):
    model = randomized(SmallResNet())
    model.state_dict()[name].view(-1)[1] = value
    with pytest.raises(ValueError, match=f"SmallResNet holds NaN or infinite values in {name};"):
        quantize(model, images(40), method=method, iters=1)


def scripted(model):
    return torch.jit.script(model)


def without_data(model):
    return model.to("meta")


def holding_scripted(model):
    return torch.nn.Sequential(torch.jit.script(model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (scripted, TypeError, r"is TorchScript \(itself\), whose layers cannot be replaced; give the torch.nn.Module"),
        (holding_scripted, TypeError, r"a Sequential, is TorchScript \(0\)"),
        (without_data, ValueError, r"on the meta device, such as conv1.weight, which hold no data; call its to_empty"),
        (
            lambda model: torch.nn.Sequential(torch.nn.LazyLinear(3)),
            ValueError,
            "first batch is to make, such as 0.weight",
        ),
    ],
    ids=["scripted", "scripted-inside", "meta", "lazy"],
)
def test_networks_whose_layers_cannot_be_had_are_clear_errors(make, error, message):
    with pytest.raises(error, match=message):
        quantize(make(randomized(SmallResNet())), images(8), method="rtn", batch_size=8)


def test_infinite_masks_are_no_error():
    model = randomized(SmallResNet())
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    check_network(model)


def test_what_is_no_network_in_floating_point_is_an_error():
    with pytest.raises(TypeError, match=r"fp_model is a NoneType; expected a torch\.nn\.Module"):
        quantize(None, images(8))
    network = quantize(randomized(SmallResNet()), images(8), method="rtn")
    with pytest.raises(ValueError, match="SmallResNet is quantized already; give the full-precision network"):
        quantize(network, images(8))


@pytest.mark.parametrize("value", [5, np.int64(5), torch.tensor(5)])
def test_whole_numbers_of_any_kind(value):
    assert type(whole_number("seed", value)) is int and whole_number("seed", value, 5) == 5


@pytest.mark.parametrize("value", ["5", 2.5, 5.0, True, None, 4])
def test_what_is_no_whole_number_is_an_error(value):
    with pytest.raises(ValueError, match=r"iters=.* should be an integer, at least 5"):
        whole_number("iters", value, 5)
