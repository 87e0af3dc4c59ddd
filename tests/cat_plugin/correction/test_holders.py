import functools
from collections import OrderedDict, defaultdict, namedtuple
from types import MethodType

import pytest
from torch import nn

from cat_plugin.correction.holders import Renewed, modules_in

OLD, NEW, OTHER = nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()
Pair = namedtuple("Pair", ["left", "right"])


def renewed(value):
    return Renewed(lambda module: NEW if module is OLD else module)(value)


def closure(module):
    def give(x, *, times=1):
        return module, x, times

    give.note = "kept"
    return give


HELD = {
    "list": lambda module: [1, module, OTHER],
    "tuple": lambda module: (1, module),
    "named tuple": lambda module: Pair(1, module),
    "set": lambda module: {module, OTHER},
    "dict": lambda module: {"a": 1, "b": module},
    "keys": lambda module: {OTHER: 1, module: 2},
    "ordered": lambda module: OrderedDict(b=1, a=module),
    "partial": lambda module: functools.partial(closure(None), module, times=2).args,
    "nested": lambda module: [{"a": ("b", [module])}],
}


@pytest.mark.parametrize("make", HELD.values(), ids=HELD)
def test_containers(make):
    value = make(OLD)
    made = renewed(value)
    assert made == make(NEW) and type(made) is type(value)
    assert value == make(OLD) and OLD in modules_in(value)
    other = make(OTHER)
    assert renewed(other) is other


def test_a_default_dict_has_its_default():
    made = renewed(defaultdict(list, a=OLD))
    assert made["a"] is NEW and made["b"] == []


def test_bound_methods():
    made = renewed([OLD.extra_repr])[0]
    assert made == NEW.extra_repr
    assert renewed(MethodType(len, OTHER)).__self__ is OTHER


def test_partials():
    part = functools.partial(closure(OLD), OLD, times=OLD)
    part.__wrapped__ = OLD.forward
    made = renewed(part)
    assert made() == (NEW, NEW, NEW) and made.__wrapped__ == NEW.forward
    assert part() == (OLD, OLD, OLD)


def test_closures_and_defaults():
    def default(x, module=OLD):
        return module, x

    made = renewed(closure(OLD))
    assert made(3, times=2) == (NEW, 3, 2) and made(3) == (NEW, 3, 1)
    assert (made.note, made.__name__, made.__module__) == ("kept", "give", __name__)
    assert renewed(default)(3) == (NEW, 3)
    assert renewed(closure(closure(OLD)))(3)[0](4) == (NEW, 4, 1)


def test_variables_of_closures_stay_shared():
    count = 0

    def counting():
        nonlocal count
        count += 1
        return OLD.weight, module

    module = OLD
    assert renewed(counting)()[1] is NEW and count == 1


def test_a_closure_that_is_not_complete():
    def give():
        return later

    assert renewed(give) is give
    later = OLD
    assert renewed(give)() is NEW


def test_what_is_shared_stays_shared():
    both = [OLD]
    first, second = renewed((both, {"again": both}))
    assert first == [NEW] and second["again"] is first


def test_what_holds_itself_ends():
    value = [OLD]
    value.append(value)
    assert renewed(value)[0] is NEW
    assert modules_in(value) == [OLD]
