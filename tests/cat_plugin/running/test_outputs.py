import copy
import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cat_plugin import CATError, CATWrapper, ClusterAffine, apply_cat, compare_accuracy
from cat_plugin.running.collect import collect_outputs
from cat_plugin.running.models import unwrap
from cat_plugin.running.outputs import check_where, extract, insert
from tests.cat_plugin.helpers import SmallNet, images, model_pair

Q, OTHER = torch.randn(3, 4), torch.randn(3, 7)
Named = namedtuple("Named", "hidden logits")
Scored = namedtuple("Scored", "loss scores")


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Tensor
    hidden: Tensor
    steps: int = 3
    total: int = dataclasses.field(init=False, default=5)


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    scores: Tensor
    name: str


@dataclasses.dataclass
class ModelOutput(OrderedDict):
    """As in transformers: a dict without the fields that are None, a tuple for numbers, and attributes."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __getitem__(self, key):
        return dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self):
        made, _, *rest = super().__reduce__()
        return made, tuple(getattr(self, field.name) for field in dataclasses.fields(self)), *rest

    def update(self, *args, **kwargs):
        raise TypeError("a ModelOutput refuses update")


class BrevitasBase(NamedTuple):
    value: Tensor
    scale: Tensor
    bit_width: Tensor


class BrevitasTensor(BrevitasBase):
    """As `IntQuantTensor`: a named tuple that torch's functions take."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*(arg.value if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


class Marked(Tensor):
    """As AIMET's `DequantizedTensor`: a tensor that knows its grid, and loses it when it is computed with."""


class Packed(Tensor):
    """As the tensors of torchao and optimum-quanto: no memory of its own."""

    @staticmethod
    def __new__(cls, integers, scale):
        made = Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype)
        made.integers, made.scale = integers, scale
        return made

    def __tensor_flatten__(self):
        return ["integers", "scale"], None

    def dequantize(self):
        return self.integers * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


CONTAINERS = {
    "tensor": (lambda q: q, None, lambda out: out),
    "tensor, whatever output says": (lambda q: q, "logits", lambda out: out),
    "tuple": (lambda q: (None, q), None, lambda out: out[1]),
    "list": (lambda q: [q, torch.tensor(0.5), "text"], None, lambda out: out[0]),
    "tuple by position": (lambda q: (q, OTHER), 0, lambda out: out[0]),
    "tuple from the end": (lambda q: (OTHER, q), -1, lambda out: out[1]),
    "list by position": (lambda q: [OTHER, q, OTHER], 1, lambda out: out[1]),
    "named tuple": (lambda q: Named(OTHER, q), None, lambda out: out.logits),
    "named tuple by field": (lambda q: Named(q, OTHER), "hidden", lambda out: out.hidden),
    "named tuple by position": (lambda q: Named(q, OTHER), 0, lambda out: out.hidden),
    "named tuple with a loss": (lambda q: Scored(torch.tensor(1.0), q), None, lambda out: out.scores),
    "dict with logits": (lambda q: {"aux": OTHER, "logits": q}, None, lambda out: out["logits"]),
    "dict by key": (lambda q: OrderedDict(out=q, aux=OTHER), "out", lambda out: out["out"]),
    "dict by number": (lambda q: {0: OTHER, 1: q}, 1, lambda out: out[1]),
    "dict with one tensor": (lambda q: {"scores": q, "ids": torch.arange(3)}, None, lambda out: out["scores"]),
    "mapping": (lambda q: UserDict(logits=q, n=1), None, lambda out: out["logits"]),
    "frozen dataclass": (lambda q: Frozen(q, OTHER), None, lambda out: out.logits),
    "dataclass with slots": (lambda q: Slotted(q, "a"), None, lambda out: out.scores),
    "model output": (lambda q: ModelOutput(torch.tensor(1.0), q, (OTHER,)), None, lambda out: out.logits),
    "model output by key": (lambda q: ModelOutput(logits=q), "logits", lambda out: out["logits"]),
    "model output by position": (lambda q: ModelOutput(torch.tensor(1.0), q), 1, lambda out: out[1]),
    "two functions": (
        lambda q: SimpleNamespace(deep=[q], n=1),
        (lambda out: out.deep[0], lambda out, q: SimpleNamespace(**{**vars(out), "deep": [q]})),
        lambda out: out.deep[0],
    ),
    "Brevitas": (lambda q: BrevitasTensor(q, OTHER, OTHER), None, lambda out: out.value),
    "Brevitas in a tuple": (lambda q: (BrevitasTensor(q, OTHER, OTHER), 1), None, lambda out: out[0].value),
}


def leaves(value):
    """Types and parts of a container, down to tensors, for comparison."""
    if dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return type(value), [leaves(part) for part in parts], list(value) if isinstance(value, dict) else None
    if isinstance(value, dict | UserDict):
        return type(value), {key: leaves(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [leaves(part) for part in value]
    if isinstance(value, SimpleNamespace):
        return type(value), leaves(vars(value))
    return (type(value), value.tolist()) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("case", CONTAINERS)
def test_type_and_all_else_come_back(case):
    make, where, logits_of = CONTAINERS[case]
    output, corrected = make(Q), torch.randn(3, 4)
    before = leaves(output)
    assert extract(output, where=where) is Q
    changed = insert(output, corrected, where)
    assert logits_of(changed) is corrected
    assert leaves(changed) == leaves(make(corrected))
    assert leaves(output) == before


def test_subclass_keeps_its_class_and_attributes():
    output = Q.as_subclass(Marked)
    output.encoding = "grid"
    plain = extract(output)
    assert type(plain) is Tensor
    assert torch.equal(plain, Q)
    changed = insert({"logits": output, "n": 1}, Q + 1)["logits"]
    assert (type(changed), changed.encoding) == (Marked, "grid")
    assert torch.equal(changed.as_subclass(Tensor), Q + 1)


class Integers(Marked):
    """As AIMET's `QuantizedTensor`: integers, which become another class when they are dequantized."""

    def dequantize(self):
        return (self.as_subclass(Tensor) * 0.5).as_subclass(Marked)


def test_integers_come_back_as_what_they_dequantize_to():
    output = torch.ones(2, 3).as_subclass(Integers)
    assert torch.equal(extract(output), torch.full((2, 3), 0.5))
    assert type(insert(output, Q)) is Marked


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_data_elsewhere_come_back_plain():
    output = Packed(torch.tensor([[1, 2], [3, 4]]), torch.tensor(0.5))
    assert extract((output,)).tolist() == [[0.5, 1.0], [1.5, 2.0]]
    assert insert((output,), Q)[0] is Q
    quantized = torch.quantize_per_tensor(torch.ones(2, 2), 0.5, 0, torch.quint8)
    assert extract(quantized).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert insert(quantized, Q) is Q


@pytest.mark.parametrize(
    ("output", "where", "message"),
    [
        (torch.zeros(3), None, r"lq returned a tensor of shape \(3,\) and dtype torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int64), None, "dtype torch.int64; expected floating-point logits"),
        (
            (Q, OTHER, None),
            None,
            r"lq returned a tuple of 3: \(Tensor \(3, 4\) float32, Tensor \(3, 7\) float32, NoneType\), in which the "
            "logits cannot be told; say which they are by output=",
        ),
        (
            OrderedDict(out=Q, aux=OTHER),
            None,
            r"a OrderedDict with 'out': Tensor \(3, 4\) float32, 'aux'",
        ),
        (
            Frozen(None, None),
            None,
            "a Frozen with 'logits': NoneType, 'hidden': NoneType, .* say which they are by output=",
        ),
        ({"logits": [Q]}, None, "a dict with 'logits': list, in which the logits cannot be told"),
        ([], None, "lq returned a list of 0: .*cannot be told"),
        ({}, None, "lq returned a dict with nothing, .*cannot be told"),
        (None, None, r"lq returned a NoneType; expected logits in .* output=\(get, set\), two functions"),
        ({"out": Q}, "logit", "output='logit' is no tensor in what lq returned, a dict with 'out': Tensor"),
        ((Q, "a"), 1, r"output=1 is no tensor in what lq returned, a tuple of 2: \(Tensor \(3, 4\) float32, str\)"),
        ((Q,), 1, "output=1 is no tensor in what lq returned, a tuple of 1"),
        (
            Q,
            (lambda out: [out], None),
            "the first function of output= made a list of 1: .* of lq's output, not a tensor",
        ),
    ],
)
def test_logits_that_cannot_be_told(output, where, message):
    with pytest.raises(CATError, match=message):
        extract(output, "lq", where)


def test_container_that_cannot_be_copied():
    with pytest.raises(CATError, match=r"a mappingproxy with 'logits': .* say how by output=\(get, set\)"):
        insert(MappingProxyType({"logits": Q}), Q)


@pytest.mark.parametrize("where", ["aux", 3, (lambda out: out["deep"], None), (lambda out: out.deep, None)])
def test_full_precision_model_may_return_something_else(where):
    assert extract({"logits": Q, "hidden": OTHER}, "fp", where, lenient=True) is Q
    assert extract((None, Q), "fp", where, lenient=True) is Q
    with pytest.raises(CATError, match="cannot be told"):
        extract((OTHER, Q), "fp", where, lenient=True)


@pytest.mark.parametrize("where", [True, 1.5, ("a", "b"), (len,), [1], len])
def test_unusable_output_argument(where):
    with pytest.raises(CATError, match="should be a key or field name, a position, or a pair of functions"):
        check_where(where)
    quantized, fp = model_pair()
    calls = [
        lambda: apply_cat(quantized, fp, images(), output=where),
        lambda: collect_outputs(quantized, fp, images(), output=where),
        lambda: compare_accuracy(fp, quantized, quantized, images(), output=where),
        lambda: CATWrapper(quantized, ClusterAffine.identity(10), output=where),
    ]
    for call in calls:
        with pytest.raises(CATError, match="should be a key or field name"):
            call()


class Contained(SmallNet):
    """`SmallNet` whose logits come in a container."""

    make = None

    def forward(self, x):
        return type(self).make(super().forward(x))


def contained(net, make):
    other = copy.deepcopy(net)
    other.__class__ = type("Contained", (Contained,), {"make": staticmethod(make)})
    return other


@pytest.mark.parametrize("case", CONTAINERS)
def test_every_container_end_to_end(case):
    make, where, logits_of = CONTAINERS[case]
    quantized, fp = (net.eval() for net in model_pair())
    x, fresh = images(400), images(20, seed=1)
    labels = fp(x).argmax(dim=1)
    expected = apply_cat(quantized, fp, x, eval_loader=[(x, labels)])
    wanted = expected.remove() and expected.correction(quantized(fresh))
    boxed = contained(quantized, make)
    plain = boxed(fresh)
    cat_model = apply_cat(boxed, fp, x, eval_loader=[(x, labels)], output=where)
    assert cat_model.report.accuracy == expected.report.accuracy
    assert leaves(boxed(fresh)) == leaves(make(wanted))
    assert leaves(cat_model(fresh)) == leaves(make(wanted))
    assert not torch.equal(logits_of(plain), wanted)
    again = compare_accuracy(contained(fp, make), boxed, cat_model, [(x, labels)], output=where)
    assert again == expected.report.accuracy
    cat_model.remove()
    assert leaves(boxed(fresh)) == leaves(plain)


@pytest.mark.parametrize("kind", ["keys", "model"])
def test_wrapper_that_is_no_module(kind):
    quantized, fp = model_pair()
    sim = SimpleNamespace(model=quantized, module=quantized if kind == "keys" else None)
    cat_model = apply_cat(sim, SimpleNamespace(module=fp), images())
    assert cat_model.quantized_model is quantized
    assert cat_model.remove() is quantized
    assert CATWrapper(sim, ClusterAffine.identity(10)).quantized_model is quantized


def test_wrappers_without_one_module():
    with pytest.raises(CATError, match=r"lq is a dict; expected a torch\.nn\.Module, or a wrapper that holds one"):
        unwrap({}, "lq")
    with pytest.raises(CATError, match=r"lq is a SimpleNamespace, which holds a torch\.nn\.Module as model and"):
        unwrap(SimpleNamespace(model=SmallNet(), module=SmallNet()), "lq")
