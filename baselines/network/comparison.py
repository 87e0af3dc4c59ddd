"""Whether two forms of a network give the same, whatever it gives, and where they part."""

import contextlib
import copy
import logging
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from baselines.network.reference_copy import HALF, cast_
from baselines.network.trace import tensors_in

logger = logging.getLogger(__name__)

_DROPOUTS = {
    *(functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d),
    *(functional.alpha_dropout, functional.feature_alpha_dropout, functional.multi_head_attention_forward),
}
_ATTENTION = functional.scaled_dot_product_attention


@torch.no_grad()
def same_outputs(model: nn.Module, other: nn.Module, example: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether both give the same outputs up to `tolerance` of the largest, compared in float64: faster formats of a GPU
    would blur the difference.

    Dropout that is left on is off here, and whatever else is random draws the same; infinite values are the same where
    both have them.
    """
    with without_dropout():
        try:
            results = [_seeded(_in_float64(m), _double(example)) for m in (model, other)]
        except Exception:  # a network, by whatever it raises, or a device that insists on its own type
            tolerance = max(tolerance, 2e-2)
            results = [_seeded(m, example) for m in (model, other)]
    return _alike(*results, tolerance)


def check_same_network(
    reference: nn.Module, network: nn.Module, images: Tensor, absorbing: Collection[str] = ()
) -> None:
    """See that `network`, made from `reference`, is still the same network.

    Args:
        reference, network: in float32 or float64; both stay as they are.
        images: inputs (N, ...) on which they are compared.
        absorbing: names of the layers that what follows them was folded into.

    Raises:
        ValueError: its outputs differ by more than rounding; says which module is the first whose output does.
    """
    if same_outputs(reference, network, images):
        return
    name = type(reference).__name__
    if not same_outputs(reference, reference, images):
        logger.warning(
            "%s gives other outputs for the same images each time, first in %s, so that its copy, which is quantized, "
            "cannot be compared with it",
            name,
            _parting(reference, reference, images, ()),
        )
        return
    sensitivity = _sensitivity(reference, images)
    if sensitivity > 0 and same_outputs(reference, network, images, min(4 * sensitivity, 2e-2)):
        logger.info("%s makes differences of %.1e of what float32 rounds; so does its copy", name, sensitivity)
        return
    where = _parting(reference, network, images, absorbing)
    raise ValueError(
        f"the copy of {name} that would be quantized gives other outputs than the network itself; the first module "
        f"where they part is {where}: look there for values that are kept from one pass to the next, or that are "
        "written into while others still read them"
    )


@torch.no_grad()
def _sensitivity(model: nn.Module, example: Tensor) -> float:
    """How far the outputs move, relative to the largest, where each weight moves by the rounding of float32."""
    generator = torch.Generator().manual_seed(0)
    moved = _in_float64(model)
    for weight in moved.parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64, device="cpu")
        weight.mul_(1 + torch.finfo(torch.float32).eps * noise.to(weight.device))
    with without_dropout():
        try:
            pairs = [tensors_in(_seeded(m, _double(example))) for m in (_in_float64(model), moved)]
        except Exception:  # one that insists on its own type
            return 0.0
    found = [
        ((a - b).abs().max() / a.abs().max().clamp(min=1e-6)).item() for a, b in zip(*pairs, strict=True) if a.numel()
    ]
    return max((value for value in found if value == value), default=0.0)


@torch.no_grad()
def warn_of_random_outputs(model: nn.Module, example: Tensor) -> None:
    """Say where the outputs of `model`, in eval mode, differ from one pass to the next."""
    with torch.random.fork_rng(_gpus(example)):
        before = _random_state(example)
        model(example.clone())
        if torch.equal(before, _random_state(example)):
            return
    if not _alike(*(_seeded(model, example, seed) for seed in (0, 1)), 1e-4):
        logger.warning(
            "the outputs of %s are random in eval mode, by %s; if this is dropout, give it training=self.training "
            "(dropout_p=0 in attention): the quantized network draws as this one does",
            type(model).__name__,
            ", ".join(_drawing(model, example)) or "something that is no torch function",
        )


def _drawing(model: nn.Module, example: Tensor) -> list[str]:
    """Functions that draw random numbers, with the innermost module that is running."""
    running = [""]

    def enter(name: str):
        return lambda module, args: running.append(name)

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            stack.enter_context(module.register_forward_pre_hook(enter(name)))
            stack.enter_context(module.register_forward_hook(lambda *args: running.pop() and None))
        watch = stack.enter_context(_Draws(running, example))
        _seeded(model, example)
    return [f"{function} in {owner or type(model).__name__}" for owner, function in dict.fromkeys(watch.found)]


class _Draws(TorchFunctionMode):
    def __init__(self, running: list[str], example: Tensor) -> None:
        super().__init__()
        self._running, self._example = running, example
        self.found: list[tuple[str, str]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        before = _random_state(self._example)
        result = function(*args, **kwargs or {})
        if not torch.equal(before, _random_state(self._example)):
            self.found.append((self._running[-1], getattr(function, "__name__", repr(function))))
        return result


class without_dropout(TorchFunctionMode):
    """Within, functions drop nothing, whatever they are told."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in _DROPOUTS and "training" in kwargs:
            kwargs["training"] = False
        elif function is torch.dropout:
            return args[0] if args else kwargs["input"]
        elif function is _ATTENTION:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.update({"dropout_p": 0.0} if "dropout_p" in kwargs else {})
        return function(*args, **kwargs)


def _in_float64(model: nn.Module) -> nn.Module:
    return cast_(copy.deepcopy(model).double(), (*HALF, torch.float32), torch.float64)


def _double(example: Tensor) -> Tensor:
    return example.double() if example.is_floating_point() else example


def _seeded(model: nn.Module, example: Tensor, seed: int = 0) -> object:
    with torch.random.fork_rng(_gpus(example)):
        torch.manual_seed(seed)
        return model(example.clone())  # which may write into it


def _gpus(example: Tensor) -> list[torch.device]:
    return [example.device] if example.is_cuda else []


def _random_state(example: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(example.device) if example.is_cuda else torch.get_rng_state()


def _alike(first: object, second: object, tolerance: float) -> bool:
    first, second = tensors_in(first), tensors_in(second)
    return len(first) == len(second) and all(_close(a, b, tolerance) for a, b in zip(first, second, strict=True))


def _close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    if first.shape != second.shape:
        return False
    odd = ~torch.isfinite(first)
    if odd.any():
        if not torch.equal(odd, ~torch.isfinite(second)):
            return False
        if not torch.equal(first[odd].nan_to_num(0.0), second[odd].nan_to_num(0.0)):
            return False
        first, second = first.masked_fill(odd, 0), second.masked_fill(odd, 0)
    if not first.numel():
        return True
    if not first.is_floating_point():
        return torch.equal(first, second)
    return bool((first - second).abs().max() <= tolerance * first.abs().max().clamp(min=1e-6))


def _parting(first: nn.Module, second: nn.Module, images: Tensor, left_out: Collection[str]) -> str:
    """The first module, innermost first, whose output is not the same in both, with its class."""
    kept: list[list[tuple[str, tuple[Tensor, ...]]]] = []
    for model in (first, second):
        with without_dropout(), _outputs_kept(model) as outputs:
            _seeded(model, images)
        kept.append(outputs)
    theirs: dict[str, list[tuple[Tensor, ...]]] = {}
    for name, output in kept[1]:
        theirs.setdefault(name, []).append(output)
    for name, output in kept[0]:
        if name not in left_out and theirs.get(name) and not _alike(output, theirs[name].pop(0), 1e-3):
            kind = type(first.get_submodule(name)).__name__
            return f"{name} ({kind})" if name else f"{kind} itself"
    return f"{type(first).__name__} itself"


@contextlib.contextmanager
def _outputs_kept(model: nn.Module) -> Iterator[list[tuple[str, tuple[Tensor, ...]]]]:
    """Within, what each module gives is kept as it was then."""
    outputs: list[tuple[str, tuple[Tensor, ...]]] = []

    def keep(name: str):
        return lambda module, args, output: outputs.append((name, tuple(t.clone() for t in tensors_in(output))))

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(keep(name)))
        yield outputs
