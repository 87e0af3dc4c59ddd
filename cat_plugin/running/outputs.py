"""From a model's output to its logits and back: the one place that knows what models return."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from cat_plugin.errors import CATError

Output = str | int | tuple[Callable[[Any], Tensor], Callable[[Any, Tensor], Any]] | None
"""Where a model's output holds the logits: a key or field, a position, or `(get, set)`, where `get(output)` gives the
logits and `set(output, logits)` the output with others. None: where it is obvious, see `extract`."""

LOGITS = "logits"


def check_where(where: Any) -> None:
    """Raises a `CATError` unless `where`, given as `output=`, is of a kind that `extract` knows."""
    is_name = where is None or isinstance(where, str | int)
    is_pair = isinstance(where, tuple) and len(where) == 2 and all(map(callable, where))
    if isinstance(where, bool) or not (is_name or is_pair):
        raise CATError(
            f"output={where!r} should be a key or field name, a position, or a pair of functions (get, set): "
            "get(output) gives the logits, set(output, logits) the output with others in their place"
        )


def extract(output: Any, source: str = "the model", where: Output = None, *, lenient: bool = False) -> Tensor:
    """The logits inside `output`, what the model named `source` returned: a plain tensor (N, C), or (N, ..., C, ...).

    A tensor is the logits. Of a tuple, list, dict, dataclass, or Hugging Face `ModelOutput`, they are what `where`
    says, else what is called "logits", else the only floating-point tensor of two or more dimensions. Tensor
    subclasses and Brevitas' quantized tensors, which are named tuples, give their floating-point values.

    Args:
        where: as `Output` says. Does not matter for an output that is one tensor, unless it is a pair of functions.
        lenient: look where it is obvious if `output` has nothing there; for the full-precision model, which may
            return another container than the quantized one.

    Raises:
        CATError: it cannot be told which part are the logits, or they are not floating-point, of 2 dimensions at least.
    """
    logits = _values(_found(output, source, where, lenient))
    if logits.ndim < 2 or not logits.is_floating_point():
        raise CATError(
            f"{source} returned a tensor of shape {tuple(logits.shape)} and dtype {logits.dtype}; "
            "expected floating-point logits of shape (images, classes), or with positions (images, classes, height, "
            "width) or (images, steps, classes)"
        )
    return logits


def insert(output: Any, logits: Tensor, where: Output = None) -> Any:
    """A copy of `output` with its logits replaced by `logits`; of the same type, all else as it was.

    `output` itself is not changed. A tensor subclass is rebuilt with the attributes that it had, so that what it says
    of its grid (`scale`, `encoding`) is said of the logits before correction; where its data are not its own memory,
    as in torchao and optimum-quanto, a plain tensor comes back.
    """
    if isinstance(where, tuple):
        return where[1](output, logits)
    parts = _parts(output)
    if parts is None:
        return _rebuilt(output, logits)
    name = _locate(parts, output, "the model", where)
    logits = _rebuilt(parts[name], logits)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return output._replace(**{name: logits})
    if isinstance(output, tuple):
        return type(output)([*output[:name], logits, *output[name + 1 :]])
    if isinstance(output, Mapping) and not isinstance(output, MutableMapping):
        raise CATError(f"{_describe(output)} cannot be given other logits; say how by output=(get, set), two functions")
    if type(output) is dict:
        return {**output, name: logits}  # compilers do not know copy.copy
    changed = copy.copy(output)
    if isinstance(output, Mapping | list):
        changed[name] = logits
    else:
        object.__setattr__(changed, name, logits)  # dataclasses may be frozen
    return changed


def first_tensor(output: Any) -> Tensor | None:
    """The values of what a layer returns, of several the first; None if that is no floating-point tensor."""
    if _values(output) is None and isinstance(output, list | tuple) and output:
        return first_tensor(output[0])
    values = _values(output)
    return values if values is not None and values.is_floating_point() else None


def with_first_changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`output` with what `change` makes of its `first_tensor` in the place of that."""
    values = _values(output)
    if values is None:
        parts = [with_first_changed(output[0], change), *output[1:]]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return _rebuilt(output, change(values))


def _found(output: Any, source: str, where: Output, lenient: bool) -> Any:
    """The part of `output` that are the logits, as it is there."""
    if isinstance(where, tuple):
        try:
            found = where[0](output)
        except (LookupError, AttributeError, TypeError):
            if not lenient:
                raise
            return _found(output, source, None, False)
        if _values(found) is None:
            raise CATError(f"the first function of output= made {_describe(found)} of {source}'s output, not a tensor")
        return found
    if _values(output) is not None:
        return output
    parts = _parts(output)
    if parts is None:
        raise CATError(
            f"{source} returned {_describe(output)}; expected logits in a tensor, tuple, list, dict or dataclass; "
            "output=(get, set), two functions, says how to take them out of anything else and put them back"
        )
    if lenient and where is not None and _key(parts, where) is None:
        where = None
    return parts[_locate(parts, output, source, where)]


def _locate(parts: dict[Any, Any], output: Any, source: str, where: Output) -> Any:
    """Key in `parts` of the logits."""
    if where is not None:
        key = _key(parts, where)
        if key is None or _values(parts[key]) is None:
            raise CATError(f"output={where!r} is no tensor in what {source} returned, {_describe(output)}")
        return key
    if LOGITS in parts and _may_be_logits(parts[LOGITS]):
        return LOGITS
    candidates = [key for key, part in parts.items() if _may_be_logits(part)]
    if len(candidates) != 1:
        raise CATError(
            f"{source} returned {_describe(output)}, in which the logits cannot be told; "
            "say which they are by output=, a key or position, or a pair of functions (get, set)"
        )
    return candidates[0]


def _key(parts: dict[Any, Any], where: str | int) -> Any:
    """The key that is `where`, or at that position; None if there is none."""
    if where in parts:
        return where
    if isinstance(where, int) and -len(parts) <= where < len(parts):
        return list(parts)[where]
    return None


def _parts(output: Any) -> dict[Any, Any] | None:
    """What a container holds, by key, field name or position; None for anything else."""
    if _is_named_tensor(output):
        return None
    if isinstance(output, Mapping):  # a ModelOutput is one, too
        return dict(output.items())
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return dict(zip(output._fields, output, strict=True))
    if isinstance(output, list | tuple):
        return dict(enumerate(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return None


def _may_be_logits(part: Any) -> bool:
    values = _values(part)
    return values is not None and values.is_floating_point() and values.ndim >= 2


def _is_named_tensor(part: Any) -> bool:
    """A named tuple of values, scale and so on that PyTorch's functions take as a tensor, as those of Brevitas."""
    is_tensor_like = isinstance(part, tuple) and hasattr(part, "_fields") and hasattr(type(part), "__torch_function__")
    return is_tensor_like and isinstance(getattr(part, "value", None), Tensor)


def _has_own_rules(tensor: Tensor) -> bool:
    """Whether its class is not PyTorch's own; those of tracers are, and must be computed with as they are."""
    return type(tensor) is not Tensor and type(tensor).__module__.split(".")[0] != "torch"


def _dequantized(part: Any) -> Any:
    """`part`, or what it stands for where its class says that by its own `dequantize`."""
    own = isinstance(part, Tensor) and _has_own_rules(part) and type(part).dequantize is not Tensor.dequantize
    return part.dequantize() if own else part


def _values(part: Any) -> Tensor | None:
    """`part` as a plain tensor, sharing its memory where that holds the values; None if it is no tensor."""
    part = part.value if _is_named_tensor(part) else _dequantized(part)
    if not isinstance(part, Tensor):
        return None
    if _has_own_rules(part):
        return part if hasattr(part, "__tensor_flatten__") else part.as_subclass(Tensor)
    return part.dequantize() if part.is_quantized else part


def _rebuilt(part: Any, logits: Tensor) -> Any:
    """`logits` in the class of `part`, as far as that is possible."""
    if _is_named_tensor(part):
        return part._replace(value=logits) if "value" in part._fields else logits
    part = _dequantized(part)
    if not _has_own_rules(part) or hasattr(part, "__tensor_flatten__"):
        return logits
    made = logits.as_subclass(type(part))
    made.__dict__.update(part.__dict__)
    return made


def _describe(value: Any) -> str:
    name, parts = type(value).__name__, _parts(value)
    if parts is None:
        return f"a {name}"
    if isinstance(value, list) or (isinstance(value, tuple) and not hasattr(value, "_fields")):
        return f"a {name} of {len(value)}: ({', '.join(map(_kind, value))})"
    return f"a {name} with {', '.join(f'{key!r}: {_kind(part)}' for key, part in parts.items()) or 'nothing'}"


def _kind(part: Any) -> str:
    if isinstance(part, Tensor):
        return f"{type(part).__name__} {tuple(part.shape)} {str(part.dtype).removeprefix('torch.')}"
    return type(part).__name__
