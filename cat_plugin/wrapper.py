"""A quantized model together with the correction that is attached to it."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from cat_plugin.config import CATConfig
from cat_plugin.correction.baked import BakedCAT
from cat_plugin.correction.channel_affine import ChannelAffine
from cat_plugin.correction.hook import LayerHook, OutputHook, Switch, find_hooks, refuse_attached
from cat_plugin.correction.module import ClusterAffine
from cat_plugin.errors import CATError
from cat_plugin.report.report import CATReport
from cat_plugin.running.loaders import model_device
from cat_plugin.running.models import inside, unwrap
from cat_plugin.running.outputs import Output, check_where
from cat_plugin.running.taps import find_layers
from cat_plugin.saving.pretrained import load, save

logger = logging.getLogger(__name__)


class CATWrapper(nn.Module):
    """Attaches `correction` to the output of `quantized_model`, and others to its layers, by forward hooks.

    From then on `quantized_model(x)` and the wrapper itself give the corrected output; parameters,
    buffers and `state_dict` of the model stay as they are. `quantized_model.forward(x)` bypasses
    hooks and so gives the plain output. Corrections follow what they correct to its device.

    Args:
        quantized_model: the user's model, which is hooked, not copied; or a wrapper around it that is no module.
        correction: takes the logits (N, C) of that model.
        report, config: how the correction came about, if known.
        output: where the model's output holds the logits, if it is not obvious, see `cat_plugin.running.outputs`.
        layers: corrections of the outputs of layers, by their names in the model.

    Raises:
        CATError: the model already carries a correction, the arguments are of other types, or there is no such layer.

    Example:
        >>> import torch
        >>> from cat_plugin import CATWrapper, ClusterAffine
        >>> model, x = torch.nn.Linear(8, 2), torch.randn(5, 8)
        >>> plain = model(x)
        >>> shift = ClusterAffine(torch.zeros(2, 1), torch.zeros(1), torch.ones(1, 2), torch.tensor([[0.0, 1.0]]))
        >>> cat_model = CATWrapper(model, shift)
        >>> torch.equal(model(x), shift(plain))
        True
        >>> with cat_model.disabled():
        ...     torch.equal(model(x), plain)
        True
    """

    def __init__(
        self,
        quantized_model: nn.Module,
        correction: ClusterAffine,
        report: CATReport | None = None,
        config: CATConfig | None = None,
        *,
        output: Output = None,
        layers: Mapping[str, ChannelAffine] | None = None,
    ) -> None:
        super().__init__()
        quantized_model = unwrap(quantized_model, "quantized_model")
        if not isinstance(correction, ClusterAffine):
            raise CATError(f"correction is a {type(correction).__name__}; expected a ClusterAffine")
        check_where(output)
        config = None if config is None else CATConfig.resolve(config)
        class_axis = None if config is None else config.class_axis
        self.layers = dict(layers or {})
        for name, part in self.layers.items():
            if not isinstance(part, ChannelAffine):
                raise CATError(f"the correction of layer {name!r} is a {type(part).__name__}; expected a ChannelAffine")
        refuse_attached(quantized_model)
        targets = find_layers(quantized_model, self.layers)
        device = model_device(quantized_model)
        switch = Switch()
        self._hook = OutputHook(correction.to(device), switch, output, class_axis)
        self._hooks = [self._hook, *(LayerHook(part.to(device), switch) for part in self.layers.values())]
        try:
            for target, hook in zip((quantized_model, *targets.values()), self._hooks, strict=True):
                hook.attach(target)
        except BaseException:
            for hook in self._hooks:
                hook.remove()
            raise
        self.quantized_model = quantized_model
        self.correction = correction
        self.report = report
        self.config = config
        self.output = output
        self.class_names: tuple[str, ...] | None = None
        self.training = quantized_model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The corrected output of the quantized model; its plain output after `remove()`."""
        return self.quantized_model(*args, **kwargs)

    @property
    def attached(self) -> bool:
        """Whether the model still carries the correction of its output."""
        return any(hook is self._hook for hook in find_hooks(self.quantized_model))

    def remove(self) -> nn.Module:
        """Takes the correction off and returns the quantized model as it was; can be called again."""
        for hook in self._hooks:
            hook.remove()
        return self.quantized_model

    def bake(self, *, fold: bool = False) -> BakedCAT:
        """The corrected model as a plain module, for `torch.compile`, `torch.export`, ONNX and `state_dict`.

        It shares the quantized model's weights and copies nothing but the correction; this wrapper and the hooks go on
        as before, and `remove()` leaves the baked module as it is. See `cat_plugin.correction.baked.BakedCAT`.

        Args:
            fold: put scale and offset of layers into their dequantization scales and biases, where that gives the same
                outputs: the integers stay as they are and nothing is computed in addition. These layers then have
                weights of their own. The others are the module's `unfolded`, and are logged.
        """
        baked = BakedCAT(self.quantized_model, self._hook, self.layers, fold)
        if fold and baked.unfolded:
            logger.warning("%d layers are not folded: %s", len(baked.unfolded), ", ".join(baked.unfolded))
        return baked

    def save_pretrained(self, folder: str | os.PathLike, *, class_names: Sequence[str] | None = None) -> None:
        """Writes the correction, not the model, into `folder`: `cat_config.json` and `cat.safetensors`.

        The first holds config, report and a fingerprint of the quantized model, the second the tensors.

        Args:
            folder: made if need be; files of these names in it are replaced.
            class_names: one text for each class, if known; by default those that the correction was loaded with.

        Raises:
            CATError: `folder` is a file, or there are more or fewer names than classes.
        """
        names = self.class_names if class_names is None else class_names
        prefix = inside(self.quantized_model)[1]
        layers = {name.removeprefix(prefix): correction for name, correction in self.layers.items()}
        save(folder, self.quantized_model, self.correction, layers, self.report, self.config, self.output, names)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        quantized_model: nn.Module,
        strict: bool = True,
        *,
        output: Output = None,
    ) -> "CATWrapper":
        """Attaches to `quantized_model` the correction that `save_pretrained` wrote into the local `folder`.

        Nothing is downloaded, and nothing in the files is run.

        Args:
            strict: refuse a model that is not the one that the correction was saved with, weights included, on whatever
                device, and under `nn.DataParallel` or `torch.compile` or not; False only logs a warning.
            output: as of `apply_cat`; functions are not saved and have to be given again.

        Raises:
            CATError: files that are missing, damaged, of another format or of another model, see
                `cat_plugin.saving.pretrained.load`; or the model already carries a correction.
        """
        model = unwrap(quantized_model, "quantized_model")
        check_where(output)
        loaded = load(folder, model, strict, output, CATReport)
        prefix = inside(model)[1]
        layers = {prefix + name: correction for name, correction in loaded.layers.items()}
        cat_model = cls(model, loaded.correction, loaded.report, loaded.config, output=loaded.output, layers=layers)
        cat_model.class_names = loaded.class_names
        return cat_model

    def disabled(self) -> AbstractContextManager[None]:
        """`with cat_model.disabled():` gives plain outputs inside the block; blocks can be nested."""
        return self._hook.switch.disabled()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "removed"
        summary = self.report.summary() if self.report else f"{self.correction.num_clusters} clusters"
        return f"CATWrapper({type(self.quantized_model).__name__}, {state}: {summary})"
