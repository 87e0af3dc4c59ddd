"""Run other people's models and leave no trace: modes, buffers and random states come back as they were."""

import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from cat_plugin.errors import CATError
from cat_plugin.running.tensors import named_tensors, storage_leaves

logger = logging.getLogger(__name__)


@contextmanager
def inference(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Evaluation mode without gradients for `models` (name -> module), restored at the end in every case.

    Restored are the training flag of every module, all parameters and buffers, of which copies are kept on the CPU, and
    the global random state of Python, NumPy, and PyTorch on the CPU and on the models' devices. An error of the body
    goes through unchanged. Models are neither copied nor traced, and their `eval()` is not called: graph modules of
    pt2e refuse it, and others fuse or merge weights there.

    Raises:
        CATError: the body succeeded but a forward pass changed parameters or buffers; or, before the
            body, that a model has tensors without data, on the meta device, or a module that stays in
            training mode.
    """
    for name, model in models.items():
        _refuse_meta(model, name)
    states = {name: _ModelState(model) for name, model in models.items()}
    random_state = _RandomState(models.values())
    try:
        for name, model in models.items():
            _set_evaluation(model, name)
        with torch.no_grad():
            yield
    except BaseException:
        try:
            _restore(states, random_state)
        except Exception:  # must not hide the error that brought us here
            logger.warning("could not restore everything after an error", exc_info=True)
        raise
    changed = _restore(states, random_state)
    if changed:
        raise CATError(
            f"a forward pass in evaluation mode changed {'; '.join(changed)}; they have been restored. "
            "Freeze observers and range estimators of a quantized model before attaching CAT"
        )


def without_autocast(like: Tensor) -> AbstractContextManager[None]:
    """Switches off the caller's autocast, which would round what matrix products take, where `like` is."""
    if not like.is_meta and torch.is_autocast_enabled(like.device.type):
        return torch.autocast(like.device.type, enabled=False)
    return nullcontext()


def _set_evaluation(model: nn.Module, name: str) -> None:
    refused = _set_training([(module, False) for module in model.modules() if getattr(module, "training", False)])
    if refused:
        paths = {module: path for path, module in model.named_modules()}
        module, error = refused[0]
        raise CATError(
            f"{paths[module] or 'the root module'} of {name}, a {type(module).__name__}, cannot be set to evaluation "
            f"mode ({error}); do that the way its toolkit does before attaching CAT"
        ) from error


def _set_training(flags: list[tuple[nn.Module, bool]]) -> list[tuple[nn.Module, Exception]]:
    """Sets training flags, and says which modules still have another and why."""
    refused = []
    for module, training in flags:
        if module.training != training:  # some refuse any change, or act on it
            try:
                module.training = training
            except (AttributeError, NotImplementedError, RuntimeError) as error:
                refused.append((module, training, error))
    # What follows another module has changed with it.
    return [(module, error) for module, training, error in refused if module.training != training]


def _refuse_meta(model: nn.Module, name: str) -> None:
    found = [key for key, tensor in named_tensors(model) if any(leaf.is_meta for leaf in storage_leaves(tensor))]
    if found:
        raise CATError(
            f"{name} has {len(found)} parameters or buffers on the meta device, such as {found[0]!r}, which hold no "
            "data; materialise the model (to_empty) and load its weights first"
        )


def _restore(states: "dict[str, _ModelState]", random_state: "_RandomState") -> list[str]:
    """Restores everything, what cannot fail first, and says which tensors a forward pass had changed."""
    for state in states.values():
        state.restore_flags()
    random_state.restore()
    found = {name: state.restore_tensors() for name, state in states.items()}
    return [f"{', '.join(tensors)} of {name}" for name, tensors in found.items() if tensors]


class _ModelState:
    """Training flags of a model, copies of all its parameters and buffers on the CPU, and what else its modules hold.

    The latter is put back in modules of which a forward pass has made or exchanged a tensor: a range estimator that
    remembers that it has done so would else go on without.
    """

    def __init__(self, model: nn.Module) -> None:
        self.flags = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
        copies: dict[int, list[Tensor]] = {}  # tied tensors are copied once
        self.tensors = []
        for path, module in model.named_modules():
            for registry in (module._parameters, module._buffers):
                saved = {}
                for name, tensor in registry.items():
                    if tensor is not None and id(tensor) not in copies:
                        copies[id(tensor)] = [leaf.to("cpu", copy=True) for leaf in storage_leaves(tensor)]
                    saved[name] = tensor, copies.get(id(tensor), [])
                self.tensors.append((f"{path}." if path else "", registry, saved, module, dict(vars(module))))

    def restore_flags(self) -> None:
        for module, error in _set_training(self.flags):
            logger.warning("the mode of a %s could not be restored: %s", type(module).__name__, error)

    def restore_tensors(self) -> list[str]:
        """Puts back what has changed; returns its names."""
        changed = set()
        for prefix, registry, saved, module, attributes in self.tensors:
            exchanged = False
            for name in registry.keys() - saved.keys():  # made by the forward pass
                del registry[name]
                changed.add(prefix + name)
                exchanged = True
            for name, (tensor, copies) in saved.items():
                if name not in registry or registry[name] is not tensor:
                    registry[name] = tensor
                    changed.add(prefix + name)
                    exchanged = True
                if tensor is not None and _put_back(tensor, copies):
                    changed.add(prefix + name)
            if exchanged:
                held = vars(module)
                for name in held.keys() - attributes.keys():
                    del held[name]
                held.update(attributes)
        return sorted(changed)


def _put_back(tensor: Tensor, copies: list[Tensor]) -> bool:
    """Whether the leaves of `tensor` differed from `copies`, which they do not any more."""
    changed = False
    for leaf, copy in zip(storage_leaves(tensor), copies, strict=True):
        if not _same_bytes(leaf, copy):
            with torch.inference_mode(leaf.is_inference()), torch.no_grad():
                if leaf.shape == copy.shape:
                    leaf.copy_(copy)
                else:
                    tensor.data = copy.to(leaf.device)
            changed = True
    return changed


def _same_bytes(leaf: Tensor, copy: Tensor) -> bool:
    """Whether two plain tensors hold the same, NaN included."""
    if leaf.dtype != copy.dtype or leaf.shape != copy.shape:
        return False
    if leaf.layout != torch.strided:
        leaf, copy = leaf.to_dense(), copy.to_dense()
    if leaf.is_quantized:
        return torch.equal(leaf.to("cpu"), copy)
    ours, theirs = (part.to("cpu").contiguous().reshape(-1).view(torch.uint8) for part in (leaf, copy))
    return torch.equal(ours, theirs)


def seed_devices(models: Iterable[nn.Module], seed: int) -> None:
    """Seeds PyTorch on the CPU and on the devices of `models`, whose random state `inference` restores; on no others,
    which `torch.manual_seed` would."""
    torch.default_generator.manual_seed(seed)
    for device in _devices(models):
        backend = getattr(torch, device.type)
        if device.type == "mps":  # the one Apple device takes no index
            backend.manual_seed(seed)
        else:
            with backend.device(device):
                backend.manual_seed(seed)


def _devices(models: Iterable[nn.Module]) -> set[torch.device]:
    """Those of `models` beside the CPU that have a random state."""
    devices = {tensor.device for model in models for tensor in (*model.parameters(), *model.buffers())}
    return {
        each for each in devices if each.type != "cpu" and hasattr(getattr(torch, each.type, None), "get_rng_state")
    }


class _RandomState:
    """Global random states of Python, NumPy, and PyTorch on the CPU and on the devices of `models`."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self.python = random.getstate()
        self.numpy = np.random.get_state()
        self.torch = torch.get_rng_state()
        self.devices = {
            # The one Apple device takes no index.
            device: getattr(torch, device.type).get_rng_state(*([] if device.type == "mps" else [device]))
            for device in _devices(models)
        }

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        for device, state in self.devices.items():
            getattr(torch, device.type).set_rng_state(state, *([] if device.type == "mps" else [device]))
