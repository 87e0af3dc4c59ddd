"""Data, models, and a full picture of the state that running a model must not touch."""

import copy
import dataclasses
import io
import random

import numpy as np
import torch
from torch import nn

from cat_plugin import CATConfig
from cat_plugin.fitting.fit import fit_and_score
from cat_plugin.fitting.store import LogitStore


def paired_logits(n_images, n_classes, seed=0, dtype=torch.float64, noise=0.5):
    """Clustered full-precision logits and distorted quantized ones, `(q, f)`, both (N, C)."""
    generator = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(12, n_classes, generator=generator, dtype=torch.float64)
    ids = torch.randint(12, (n_images,), generator=generator)
    f = centers[ids] + torch.randn(n_images, n_classes, generator=generator, dtype=torch.float64)
    distortion = 0.7 + 0.1 * torch.randn(n_classes, generator=generator, dtype=torch.float64)
    q = f * distortion + 0.3 + noise * torch.randn(n_images, n_classes, generator=generator, dtype=torch.float64)
    return q.to(dtype), f.to(dtype)


def in_use(shared):
    """`shared` with the clusters that were asked for in use."""
    return dataclasses.replace(shared, clusters=shared.tried[0]) if shared.tried else shared


def held_out_scores(q, f, config=None, images=None):
    """What a fit says of images that it was cross-fitted on."""
    return fit_and_score(LogitStore.of(q, f, images), CATConfig.resolve(config)).scores


def copied(module, how):
    """`module` as `copy.deepcopy` gives it, or with `"save"` as it comes back from a file."""
    if how == "deepcopy":
        return copy.deepcopy(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class SmallNet(nn.Module):
    """Six inputs to `classes` logits through batch norm and dropout, so that modes matter."""

    def __init__(self, classes=10, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, classes)
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.5)

    def forward(self, x):
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


class Wrapped(torch.Tensor):
    """A tensor subclass without memory of its own, as quantization tools make them."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Wrapped(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def model_pair(classes=10):
    """`(quantized, fp)`: the first is a copy of the second with coarse weights."""
    fp = SmallNet(classes)
    quantized = copy.deepcopy(fp)
    with torch.no_grad():
        for parameter in quantized.parameters():
            parameter.copy_((parameter * 4).round() / 4)
    return quantized, fp


def images(n_images=96, seed=0):
    """A stacked tensor of inputs (N, 6) for `SmallNet`."""
    return torch.randn(n_images, 6, generator=torch.Generator().manual_seed(seed))


def state_of(*models):
    """Everything that must be the same before and after, as nested comparable values."""
    return [_model_state(model) for model in models] + [
        repr(random.getstate()),
        repr(np.random.get_state()[1].tolist()),
        torch.get_rng_state().tolist(),
    ]


def _model_state(model):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {
        "tensors": {name: value.tolist() for name, value in model.state_dict().items()},
        "training": [(name, module.training) for name, module in model.named_modules()],
        "hooks": [dict(getattr(module, table)) for module in model.modules() for table in tables],
        "grads": [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
    }
