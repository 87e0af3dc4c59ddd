"""Modules that hold a network and call it: for several devices, or compiled."""

from torch import nn

_HELD_AS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
"""By the name of torch's class, since that of compiled modules is private."""


def held_network(model: nn.Module) -> nn.Module:
    """The network inside of `nn.DataParallel`, `DistributedDataParallel` and what `torch.compile` gives; `model` itself
    where it is none of these."""
    while (name := _held_as(model)) is not None:
        model = getattr(model, name)
    return model


def open_containers(model: nn.Module) -> None:
    """Put the networks that containers inside of `model` hold in their place."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = held_network(child)


def _held_as(model: nn.Module) -> str | None:
    name = _HELD_AS.get(type(model).__name__)
    return name if name is not None and type(model).__module__.startswith("torch.") else None
