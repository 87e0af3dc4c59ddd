"""One forward pass, watched: which module was called when, which value went from which module into which, and which
torch functions a module called by itself.

Values are recognised by the identity of their tensor and its version, which changes with every in-place operation. So
no symbolic tracing is needed, and any control flow will do.
"""

import contextlib
import dataclasses
import functools
import inspect
import numbers
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

EXAMPLES = 2
"""So many images are enough to see how a network computes."""


class Value(NamedTuple):
    """A tensor as it was at one moment."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Value":
        return cls(tensor, tensor._version)

    def same(self, other: "Value | None") -> bool:
        """Whether both are the same tensor with nothing written into it between."""
        return other is not None and self.tensor is other.tensor and self.version == other.version


_CONSTANTS = (type(None), numbers.Number, str, bytes, torch.dtype, torch.device, Enum)


@dataclass(frozen=True)
class Arguments:
    """How a module was called with one tensor, beside which there were only constants: numbers, names, tuples of them.

    Attributes:
        args, kwargs: of the call, with `None` where the tensor was.
        place: of the tensor, its position or its name.
    """

    args: tuple
    kwargs: dict[str, object]
    place: int | str

    @classmethod
    def around(cls, place: int | str, args: tuple, kwargs: dict[str, object]) -> "Arguments":
        """Those of a call whose tensor is at `place`."""
        return cls(*at_place(place, lambda _: None, args, kwargs), place)

    @property
    def alone(self) -> bool:
        """Whether the call was `module(tensor)`."""
        return self.place == 0 and len(self.args) == 1 and not self.kwargs

    def of(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """`module` as a function of the one tensor."""
        return module if self.alone else functools.partial(self._call, module)

    def _call(self, module: nn.Module, x: Tensor) -> Tensor:
        args, kwargs = at_place(self.place, lambda _: x, self.args, self.kwargs)
        return module(*args, **kwargs)

    def tensor_of(self, args: tuple, kwargs: dict[str, object]) -> Tensor | None:
        """The tensor of a call that is the same otherwise; `None` of any other call."""
        tensor = kwargs.get(self.place) if isinstance(self.place, str) else next(iter(args[self.place :]), None)
        if not isinstance(tensor, Tensor):
            return None
        return tensor if self.same(Arguments.around(self.place, args, kwargs)) else None

    def same(self, other: "Arguments | None") -> bool:
        """Whether the tensor has the same place in both, and the constants are the same."""
        if other is None or self.place != other.place or self.kwargs.keys() != other.kwargs.keys():
            return False
        return _same((self.args, *self.kwargs.values()), (other.args, *(other.kwargs[name] for name in self.kwargs)))


def _same(one: object, two: object) -> bool:
    if isinstance(one, tuple) and type(one) is type(two):
        return len(one) == len(two) and all(map(_same, one, two))
    return one is two or (isinstance(one, _CONSTANTS) and type(one) is type(two) and one == two)


def at_place(
    place: int | str, function: Callable[[Tensor], Tensor], args: tuple, kwargs: dict[str, object]
) -> tuple[tuple, dict[str, object]]:
    """The arguments of a call, with `function` of the one at this place, a position or a name, instead of it."""
    if isinstance(place, str):
        return args, kwargs | {place: function(kwargs[place])}
    return (*args[:place], function(args[place]), *args[place + 1 :]), kwargs


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one module.

    Attributes:
        inputs: all tensors among the arguments; `output` is `None` unless it is one tensor.
        arguments: how to make the call with another tensor; `None` unless it was made with one tensor and constants.
        parents: names of the modules that were running.
    """

    name: str
    module: nn.Module
    inputs: tuple[Value, ...]
    output: Value | None
    arguments: Arguments | None
    parents: tuple[str, ...]

    @property
    def one_to_one(self) -> bool:
        """Whether the call made one tensor of one tensor and constants."""
        return self.arguments is not None and self.output is not None


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of a torch function (or operator, or method of a tensor) that gave a floating-point tensor.

    Attributes:
        owner: name of the innermost module that was running.
        call: index of that module's call in `Trace.started`.
        outputs: the tensors among its results.
    """

    owner: str
    call: int
    function: Callable[..., object]
    args: tuple
    kwargs: dict[str, object]
    outputs: tuple[Tensor, ...]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All tensors among the arguments."""
        return tensors_in(self.args, self.kwargs)


@dataclass
class Trace:
    """All calls of one forward pass; a module comes after the modules that it called.

    Attributes:
        images: what the network was given.
        reads: what torch functions took, as it was then, with the name of the innermost module that was running.
        unseen: what multiplies without being one of the operations, as in scripted code (`unseen_products`): name of
            the innermost module that was running, and of the function.
    """

    calls: list[Call] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    reads: list[tuple[str, Value]] = field(default_factory=list)
    images: Tensor | None = None
    output: object = None
    unseen: list[tuple[str, str]] = field(default_factory=list)

    def of(self, name: str) -> list[Call]:
        """The calls of the module called `name`."""
        return [call for call in self.calls if call.name == name]

    def confirmed_by(self, other: "Trace | None") -> "Trace":
        """This trace, less the arguments of calls that `other` made with other constants. It is the same network's, of
        other images and another number of them, and without it nothing counts as a constant."""
        others: dict[str, list[Call]] = {}
        for call in reversed([] if other is None else other.calls):
            others.setdefault(call.name, []).append(call)
        calls = []
        for call in self.calls:
            same = others[call.name].pop() if others.get(call.name) else None
            alone = call.arguments is None or call.arguments.alone
            confirmed = alone if same is None else alone or call.arguments.same(same.arguments)
            calls.append(call if confirmed else dataclasses.replace(call, arguments=None))
        return dataclasses.replace(self, calls=calls)

    def order(self, names: list[str]) -> list[str]:
        """`names` in the order in which the modules were first called; those never called are left out."""
        return sorted(set(names) & set(self.started), key=self.started.index)

    def readers(self, value: Value) -> list[Call]:
        """Calls of modules that got `value` as an input."""
        return [call for call in self.calls if any(value.same(other) for other in call.inputs)]

    def functions_reading(self, value: Value) -> set[str]:
        """Names of the modules that handed `value` to a torch function."""
        return {owner for owner, other in self.reads if value.same(other)}


def tensors_in(*values: object) -> tuple[Tensor, ...]:
    """All tensors in (nested) tuples, lists, dicts and dataclasses."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found.extend(tensors_in(*value))
        elif isinstance(value, Mapping):
            found.extend(tensors_in(*value.values()))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            found.extend(tensors_in(*(getattr(value, each.name) for each in dataclasses.fields(value))))
    return tuple(found)


def by_signature(forward: Callable[..., object], kwargs: dict[str, object]) -> dict[str, object]:
    """`kwargs` in the order in which `forward` names them, not in that of the call."""
    if len(kwargs) < 2:
        return kwargs
    order = list(inspect.signature(forward).parameters)
    return dict(sorted(kwargs.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def with_first_tensor(
    function: Callable[[Tensor], Tensor], args: tuple, kwargs: dict[str, object]
) -> tuple[tuple, dict[str, object]]:
    """The arguments of a call, named ones by signature, with `function` of the first tensor among them in its place."""
    if args and isinstance(args[0], Tensor):
        return (function(args[0]), *args[1:]), kwargs
    leaves, structure = tree_flatten((args, kwargs))
    place = next((index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
    if place is not None:
        leaves[place] = function(leaves[place])
    return tree_unflatten(leaves, structure)


@torch.no_grad()
def trace(model: nn.Module, x: Tensor) -> Trace:
    """Run `model(x)` and record every module call and every torch function. The model's hooks are as before
    afterwards."""
    record = Trace(images=x)
    running: list[_Running] = []

    def enter(name: str):
        def hook(module, args, kwargs):
            values = tuple(map(Value.of, tensors_in(args, by_signature(module.forward, kwargs))))
            running.append(_Running(name, len(record.started), values, _arguments(module, args, kwargs)))
            record.started.append(name)

        return hook

    def leave(module, args, kwargs, output):
        this = running.pop()
        value = Value.of(output) if isinstance(output, Tensor) else None
        parents = tuple(parent.name for parent in running)
        record.calls.append(Call(this.name, module, this.inputs, value, this.arguments, parents))

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(leave, with_kwargs=True))
        with uncompiled(), _Watch(record, running):
            record.output = model(x.clone())  # which may write into it
    return record


def memory_of(tensor: Tensor) -> int:
    """What views of the same memory have in common; of layouts without a memory of their own, the tensor itself."""
    address = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
    return address or -id(tensor)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Within, compiled functions run as they are written, where they can be watched."""
    if not {"torch._dynamo", "torch.nn.attention.flex_attention"} & sys.modules.keys():
        yield  # nothing can be compiled, and loading the compiler takes seconds
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def called_as_recorded(model: nn.Module, record: Trace, names: Iterable[str]) -> Iterator[None]:
    """Within, passes of `model` must call the modules `names` as often as the recorded one did.

    Those that were called more than once may be called more or less often, but not stay away.

    Raises:
        ValueError: one is not; then control flow depends on data, and what was found about the network need not hold.
    """
    names = list(names)
    expected = Counter(record.started)
    seen: Counter[str] = Counter()

    def count(name: str):
        return lambda module, args: seen.update([name])

    def compare(module, args, output):
        for name in names:
            differs = seen[name] != expected[name] and (expected[name] <= 1 or seen[name] == 0)
            if differs:
                raise ValueError(
                    f"{name} runs {seen[name]} times for some calibration images, but {expected[name]} times for the "
                    f"first ones: control flow of {type(model).__name__} depends on data and hides layers; let every "
                    "image take the same path, or quantize the paths as networks of their own"
                )
        seen.clear()

    with contextlib.ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(count(name)))
        hooks.enter_context(model.register_forward_hook(compare))
        yield


class _Running(NamedTuple):
    """A module whose forward pass has begun."""

    name: str
    call: int
    inputs: tuple[Value, ...]
    arguments: Arguments | None


class _Watch(TorchFunctionMode):
    """Writes down every torch function that gives a floating-point tensor."""

    def __init__(self, record: Trace, running: list[_Running]) -> None:
        super().__init__()
        self._record, self._running = record, running

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        taken = tuple(map(Value.of, tensors_in(args, kwargs)))
        result = function(*args, **kwargs)
        given = tensors_in(result)
        if self._running and (given or function is Tensor.__setitem__):  # asking for a shape is no reading
            this = self._running[-1]
            self._record.reads.extend((this.name, value) for value in taken)
            outputs = tuple(tensor for tensor in given if tensor.is_floating_point())
            if outputs:
                self._record.operations.append(Operation(this.name, this.call, function, args, kwargs, outputs))
        return result


def _arguments(module: nn.Module, args: tuple, kwargs: dict[str, object]) -> Arguments | None:
    """Those of a call with one tensor and constants; the module's own defaults are constants, too."""
    given = dict(enumerate(args)) | kwargs
    places = [place for place, value in given.items() if isinstance(value, Tensor)]
    others = [value for value in given.values() if not isinstance(value, Tensor)]
    odd = [value for value in others if not _is_constant(value)]
    if len(places) != 1 or (odd and not _are_defaults(odd, module.forward)):
        return None
    return Arguments.around(places[0], args, kwargs)


def _is_constant(value: object) -> bool:
    """Nothing that can be written into: the module might, and others might read it."""
    return isinstance(value, _CONSTANTS) or (isinstance(value, tuple) and all(map(_is_constant, value)))


def _are_defaults(values: list[object], forward: Callable[..., object]) -> bool:
    """Whether all of them are default values of parameters."""
    try:
        defaults = [parameter.default for parameter in inspect.signature(forward).parameters.values()]
    except (TypeError, ValueError):
        return False
    return all(any(value is default for default in defaults) for value in values)
