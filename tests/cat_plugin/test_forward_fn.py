from collections import UserDict

import pytest
import torch
from torch import nn

from cat_plugin import CATError, apply_cat, compare_accuracy
from cat_plugin.running.collect import collect_outputs
from cat_plugin.running.loaders import find_inputs, iterate_inputs, run
from tests.cat_plugin.helpers import images, model_pair, state_of


class Masked(nn.Module):
    """Takes the inputs of `SmallNet`, and a mask by keyword; returns a dict, as Hugging Face models do."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, values, *, mask, labels=None):
        return {"loss": None if labels is None else torch.tensor(0.0), "logits": self.net(values * mask)}


X, MASK = images(400), (torch.rand(400, 6, generator=torch.Generator().manual_seed(1)) < 0.8).float()
Y = torch.arange(400) % 10
SPLIT = [(X[:300], MASK[:300], Y[:300]), (X[300:], MASK[300:], Y[300:])]
LOADERS = {
    "tuples": (SPLIT, lambda model, batch: model(batch[0], mask=batch[1])),
    "lists": ([list(batch) for batch in SPLIT], lambda model, batch: model(batch[0], mask=batch[1])),
    "dicts": (
        [dict(zip(("values", "mask", "labels"), batch, strict=True)) for batch in SPLIT],
        lambda model, batch: model(**batch),
    ),
    "mappings": (
        [UserDict(values=x, mask=mask, label=y.tolist()) for x, mask, y in SPLIT],
        lambda model, batch: model(batch["values"], mask=batch["mask"]),
    ),
    "nested": (
        [((x, {"mask": mask}), y) for x, mask, y in SPLIT],
        lambda model, batch: model(batch[0][0], **batch[0][1]),
    ),
}


def masked_pair():
    return tuple(Masked(net).eval() for net in model_pair())


@pytest.mark.parametrize("case", LOADERS)
def test_models_of_several_inputs(case):
    loader, forward_fn = LOADERS[case]
    quantized, fp = masked_pair()
    before = state_of(quantized, fp)
    inner = apply_cat(quantized.net, fp.net, X * MASK, eval_loader=[(X * MASK, Y)])
    expected = inner.report.accuracy
    with torch.no_grad():
        wanted = quantized.net(X * MASK)
    inner.remove()
    cat_model = apply_cat(quantized, fp, loader, eval_loader=loader, forward_fn=forward_fn)
    assert cat_model.report.accuracy == expected
    assert compare_accuracy(fp, quantized, cat_model, loader, forward_fn=forward_fn) == expected
    with torch.no_grad():
        out = cat_model(X, mask=MASK, labels=Y)
    torch.testing.assert_close(out["logits"], wanted)
    assert out["loss"] == 0
    cat_model.remove()
    assert state_of(quantized, fp) == before


def test_one_stacked_tensor_is_cut_for_forward_fn_too():
    seen = []

    def forward_fn(model, batch):
        seen.append(len(batch))
        return model(batch)

    pairs = collect_outputs(*model_pair(), X, forward_fn=forward_fn, batch_size=150)
    assert seen == [150, 150, 150, 150, 100, 100]
    torch.testing.assert_close(pairs.q, collect_outputs(*model_pair(), X).q)


def test_pairs_hold_labels_and_know_calibration_images():
    quantized, fp = masked_pair()
    loader, forward_fn = LOADERS["dicts"]
    assert torch.equal(collect_outputs(quantized, fp, loader, forward_fn=forward_fn).targets, Y)
    net, fp = model_pair()
    net.calibration_digests = {"no image"}
    known = [{"x": X, "labels": Y}]
    pairs = collect_outputs(net, fp, known, forward_fn=lambda model, batch: model(batch["x"]))
    assert pairs.calibrated.sum() == 0
    unknown = [{"a": X, "b": X}]
    assert collect_outputs(net, fp, unknown, forward_fn=lambda model, batch: model(batch["a"])).calibrated is None


@pytest.mark.parametrize(
    ("batch", "labels"),
    [
        ((X, MASK, Y), Y),
        ((X, MASK), None),
        ((X, Y, Y), None),  # two that may be the labels
        ((Y, X), None),  # the first part is an input
        ((X, Y.unsqueeze(1)), Y),
        ({"values": X, "target": Y.tolist()}, Y),
        ({"values": X, "labels": torch.zeros(400, 5, 5, dtype=torch.int64)}, torch.zeros(400, 5, 5, dtype=torch.int64)),
        ({"ids": Y}, None),
        (X, None),
        ("text", None),
    ],
)
def test_labels_beside_unknown_inputs(batch, labels):
    ((found, targets),) = iterate_inputs([batch], whole=True)
    assert found is batch
    assert (targets is None) if labels is None else torch.equal(targets, labels)


class Anything:
    """A batch of a library of its own."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        return Anything(self.x.to(device))


def test_batches_go_to_the_device_of_the_model():
    meta, x = nn.Linear(6, 2, device="meta"), images(4)
    given = {"a": x, "b": [x, (x, "text")], "c": UserDict(d=Anything(x)), "e": 3}
    seen = run(meta, given, lambda model, batch: batch)
    assert type(seen) is dict
    assert type(seen["b"][1]) is tuple
    tensors = seen["a"], seen["b"][0], seen["b"][1][0], seen["c"]["d"].x
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (seen["b"][1][1], seen["e"]) == ("text", 3)
    assert given["a"] is x
    assert given["c"]["d"].x is x
    anywhere = run(nn.ReLU(), given, lambda model, batch: batch)
    assert torch.equal(anywhere["a"], x) and anywhere["a"] is not x and anywhere["c"]["d"].x is x


def test_find_inputs():
    assert find_inputs({"pixel_values": X, "pixel_mask": MASK}) is X
    assert find_inputs({"a": X, "b": X}) is None


ERRORS = {
    "not callable": (masked_pair, X, "model(x)", "forward_fn is a str; expected a function of"),
    "no forward_fn": (
        masked_pair,
        SPLIT,
        None,
        r"quantized_model cannot be called with one tensor, Masked.forward\(values, \*, mask, labels=None\) \("
        "missing a required .*'mask'.*give forward_fn=",
    ),
    "tuple of others": (model_pair, [("a", X)], None, r"a tuple of \(str, Tensor\); .* give forward_fn="),
    "dict of several": (
        model_pair,
        [{"ids": X, "mask": MASK}],
        None,
        r"keys \['ids', 'mask'\].*give forward_fn=",
    ),
    "other kind of batch": (model_pair, ["text"], None, "a batch is a str; .* give forward_fn="),
    "model not called": (
        model_pair,
        X,
        lambda model, batch: model.forward(batch),
        "forward_fn does not call the model",
    ),
    "changed logits": (
        model_pair,
        X,
        lambda model, batch: (model(batch) + model(-batch)) / 2,
        "forward_fn returned other logits than quantized_model gave it",
    ),
    "nothing returned": (model_pair, X, lambda model, batch: [model(batch), None][1], "forward_fn returned a NoneType"),
    "no batches": (model_pair, [], lambda model, batch: model(batch), "the loader yielded no images"),
    "empty batches": (model_pair, [X[:0]], lambda model, batch: model(batch), "the loader yielded no images"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_leave_no_trace(case):
    make, loader, forward_fn, message = ERRORS[case]
    quantized, fp = make()
    before = state_of(quantized, fp)
    with pytest.raises(CATError, match=message):
        apply_cat(quantized, fp, loader, forward_fn=forward_fn)
    assert state_of(quantized, fp) == before


def test_hooks_may_add_arguments():
    quantized, fp = masked_pair()
    for model in (quantized, fp):
        model.register_forward_pre_hook(lambda module, args, kwargs: (args, {"mask": 1.0}), with_kwargs=True)
    torch.testing.assert_close(collect_outputs(quantized, fp, X).q, collect_outputs(quantized.net, fp.net, X).q)


def test_accuracy_needs_labels_that_can_be_told():
    quantized, fp = model_pair()
    with pytest.raises(CATError, match="accuracy needs class labels"):
        compare_accuracy(fp, quantized, quantized, [(X, Y, Y)], forward_fn=lambda model, batch: model(batch[0]))
