import itertools
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cat_plugin import CATError
from cat_plugin.running.loaders import batch_size_for, iterate_inputs, model_device, num_batches, place, run

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)


class DictDataset(torch.utils.data.Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"pixel_values": X[index], "label": int(Y[index]), "weight": torch.ones(1), "path": "a.png"}


LOADERS = {
    "stacked tensor": (X, False),
    "list of tensors": (list(X.split(4)), False),
    "list of two tensors": (list(X.split(5)), False),
    "list of pairs": ([(X[:4], Y[:4]), (X[4:], Y[4:])], True),
    "list of single-element batches": ([(X[:7],), [X[7:]]], False),
    "generator": ((part for part in X.split(3)), False),
    "DataLoader of tensors": (DataLoader(X, 4), False),
    "DataLoader of pairs": (DataLoader(TensorDataset(X, Y), 4), True),
    "DataLoader of one-tuples": (DataLoader(TensorDataset(X), 4), False),
    "DataLoader of dicts": (DataLoader(DictDataset(), 4), True),
    "dicts with an unknown key": ([{"picture": X, "target": Y}], True),
    "mappings that are no dict": ([UserDict(image=X, other=X, y=Y)], True),
    "triples with an index": ([(X[:4], Y[:4], Y[:4] + 100), [X[4:], Y[4:], Y[4:] + 100, "a.png"]], True),
    "lists of dicts, as of DALI": ([[{"data": X[:4], "label": Y[:4, None]}], [{"data": X[4:], "label": Y[4:]}]], True),
    "several dicts at once": ([[{"data": X[:4], "label": Y[:4]}, {"data": X[4:], "label": Y[4:]}]], True),
    "labels as column": ([(X, Y.unsqueeze(1))], True),
    "labels as list": ([(X, Y.tolist())], True),
    "labels that are no classes": ([(X, torch.rand(10))], False),
    "labels of any kind": ([(X, ["a"] * 10)], False),
}


@pytest.mark.parametrize("name", LOADERS)
def test_every_image_once_and_in_order(name):
    loader, labelled = LOADERS[name]
    batches = list(iterate_inputs(loader, batch_size=4))
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), X)
    if labelled:
        assert torch.equal(torch.cat([targets for _, targets in batches]), Y)
    else:
        assert all(targets is None for _, targets in batches)


def test_batch_size_cuts_the_stacked_tensor_only():
    assert [len(inputs) for inputs, _ in iterate_inputs(X, 4)] == [4, 4, 2]
    assert [len(inputs) for inputs, _ in iterate_inputs([X], 4)] == [10]
    assert num_batches(X, 4) == 3
    assert num_batches([X], 4) == 1
    assert num_batches(iter([X])) is None


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "the loader yielded no images"),
        (DataLoader(X[:0]), "the loader yielded no images"),
        (X[:0], "the loader yielded no images"),
        ([X[:0], X[:0]], "the loader yielded no images"),
        ((X, Y), r"the loader is a tuple, which looks like one batch; pass a list of batches"),
        ({"image": X}, "the loader is a dict, which looks like one batch"),
        (TensorDataset(X, Y), "the loader is a TensorDataset, a dataset, which gives single images; wrap it in a Data"),
        (DictDataset(), "the loader is a DictDataset, a dataset"),
        (3, "the loader is a int; expected a DataLoader"),
        ("images/", "the loader is a str; expected a DataLoader"),
        (X.numpy(), r"the loader is a NumPy array; expected a tensor: torch.from_numpy\(images\)"),
        (torch.tensor(1.0), "the loader is a tensor without dimensions"),
        ([torch.tensor(1.0)], "a batch is a tensor without dimensions"),
        ([X.numpy()], "a batch is a ndarray; expected a tensor"),
        ([()], r"a batch is a tuple of \(\); expected \(input, target\) or \(input,\), input a tensor"),
        ([(X.numpy(), Y)], r"a batch is a tuple of \(ndarray, Tensor\)"),
        ([{"a": X, "b": X, "label": Y}], r"dict with keys \['a', 'b', 'label'\], in which the one input"),
        ([{"x": X, "image": X}], r"dict with keys \['x', 'image'\]"),
        ([{"label": Y}], r"dict with keys \['label'\]"),
    ],
)
def test_unusable_loader(loader, message):
    with pytest.raises(CATError, match=message):
        list(iterate_inputs(loader))


def test_endless_loaders_are_an_error(monkeypatch):
    monkeypatch.setattr("cat_plugin.running.loaders.MOST_IMAGES", 20)
    with pytest.raises(CATError, match="has no length and has yielded more than 20 images; if it is endless, cut it"):
        list(iterate_inputs(itertools.cycle([X])))
    with pytest.raises(CATError, match="has no length"):
        list(iterate_inputs(itertools.cycle([X] * 3), whole=True))
    assert len(list(iterate_inputs([X] * 6))) == 6  # which has a length
    assert len(list(iterate_inputs(itertools.islice(itertools.cycle([X]), 2)))) == 2


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True])
def test_invalid_batch_size(batch_size):
    with pytest.raises(CATError, match=f"batch_size={batch_size!r} should be an integer >= 1"):
        list(iterate_inputs(X, batch_size))


def test_inputs_go_where_the_model_is():
    assert place(X, nn.Linear(2, 3)) is X
    meta = nn.BatchNorm1d(2, affine=False, device="meta")
    assert place(X, meta).device.type == "meta"
    assert model_device(nn.ReLU()) is None
    assert place(X, nn.ReLU()) is X


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_inputs_get_the_dtype_that_the_model_computes_in(wanted, given):
    model = nn.Linear(2, 3).to(wanted)
    assert place(X.to(given), model).dtype == wanted
    assert place(Y, model).dtype == torch.int64


def test_weights_of_8_bits_say_nothing_about_inputs():
    model = nn.Linear(2, 3)
    model.weight = nn.Parameter(model.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert place(X.double(), model).dtype == torch.float32
    model.bias = None
    assert place(X.double(), model).dtype == torch.float64


@pytest.mark.parametrize(
    ("loader", "given", "expected"),
    [
        (torch.zeros(10, 3, 32, 32), None, 64),
        (torch.zeros(10, 3, 224, 224), None, 6),  # 4 MB of 600 KB each
        (torch.zeros(2, 3, 2000, 2000), None, 1),
        (torch.zeros(10, 3, 224, 224), 9, 9),
        (torch.zeros(0, 3, 224, 224), None, 64),
        (torch.tensor(1.0), None, 64),
        ([torch.zeros(2, 3, 2000, 2000)], None, 64),
    ],
    ids=["small", "large", "huge", "as given", "none", "no images", "a list"],
)
def test_a_tensor_is_cut_into_batches_that_stay_in_the_cache(loader, given, expected):
    assert batch_size_for(loader, torch.nn.Linear(2, 2), given) == expected


class InPlace(nn.Module):
    """Normalises its input in place, as `torchvision.transforms.Normalize(inplace=True)`."""

    def forward(self, x):
        return x.sub_(0.5).div_(0.25)


@pytest.mark.parametrize("how", ["tensor", "dict", "tuple"])
def test_every_model_gets_a_copy_of_its_own(how):
    x = torch.rand(4, 3)
    wrapped = {"tensor": x, "dict": {"x": x, "n": 1}, "tuple": (x, None)}[how]
    take = {"tensor": lambda b: b, "dict": lambda b: b["x"], "tuple": lambda b: b[0]}[how]
    before, model = x.clone(), InPlace()
    for _ in range(2):
        out = run(model, wrapped, None if how == "tensor" else lambda model, batch: model(take(batch)))
        assert torch.equal(out, (before - 0.5) / 0.25)
    assert torch.equal(x, before)


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="needs Python 3.11")
def test_error_of_a_model_tells_the_shape_of_the_batch():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(RuntimeError) as caught:
        run(model, torch.zeros(3, 2, 2, dtype=torch.float64))  # one image, without the axis that counts images
    (note,) = caught.value.__notes__
    assert note == ("Sequential was run on a batch of shape (3, 2, 2), torch.float32, whose first axis counts images")
