"""A quantized network whose layers have corrections that are being fitted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_plugin.correction.channel_affine import ChannelAffine, per_channel
from cat_plugin.layers.gradients import forget_graphs, remembered_graphs
from cat_plugin.layers.images import Part
from cat_plugin.layers.place import Place
from cat_plugin.running.loaders import ForwardFn, model_device, run
from cat_plugin.running.outputs import Output, extract, with_first_changed

BATCH = 32
"""Images a step, of all processes together, and as many at once where memory is fast."""
BYTES_AT_ONCE = 2**24
"""Of a layer's output, for each thread of a CPU. Larger ones leave the cache, and their memory is asked from the system
every time."""

NO_EPS = 1e-30
"""Of a batch norm: GPUs take no 0, and 1 plus this is 1 in every type."""
IMAGES_NDIM = 4
SAME = 0.05
"""Share of a gradient that rounding may change, which takes some values over a step of a quantizer."""


class CorrectedNetwork:
    """Runs the quantized model with corrections of its layers, which are two numbers a channel of one vector.

    The vector holds the deviations of all scales from 1, then all offsets in units of the channels' spread.

    Args:
        layers: by name; places: theirs, in the order of the vector.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        places: Sequence[Place],
        output: Output = None,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        self.model, self.places = model, list(places)
        self.device = model_device(model) or torch.device("cpu")
        self._layers = [layers[place.name] for place in places]
        self._graphs = remembered_graphs(model)
        with torch.inference_mode(False):  # what was measured in inference mode takes part in gradients
            self._spread = torch.cat([place.spread for place in places]).to(self.device)
        self._sizes = [place.channels for place in places]
        self._output, self._forward_fn = output, forward_fn
        self._channels_last = False
        # Another thread that runs the model meanwhile gets its plain output.
        self._current: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("corrections here", default=None)

    @property
    def at_once(self) -> int:
        """How many images the network runs fastest on, up to `BATCH`."""
        if self.device.type != "cpu":
            return BATCH
        largest = 4 * max((place.numbers for place in self.places), default=1)
        return min(max(BYTES_AT_ONCE * torch.get_num_threads() // largest, 1), BATCH)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return 2 * sum(self._sizes)

    def chosen(self, scales: bool, offsets: bool) -> Tensor:
        """(size,) 1 where the vector holds what is chosen, else 0."""
        half = torch.ones(self.size // 2, device=self.device)
        return torch.cat([half * scales, half * offsets])

    @contextmanager
    def attached(self) -> Iterator["CorrectedNetwork"]:
        """The hooks are on the layers inside the block; they act while `rows` is running."""
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                stack.callback(layer.register_forward_hook(_Hook(self, index, self.places[index].axis)).remove)
            yield self

    def rows(self, part: Part, vector: Tensor | None) -> Tensor:
        """(n, C) logits of the images in `part` that count, with the corrections of `vector`, or without."""
        token = self._current.set(None if vector is None else self._split(vector))
        batch = part.batch
        forget_graphs(self.model, self._graphs)
        if self._channels_last and isinstance(batch, Tensor) and batch.ndim == IMAGES_NDIM:
            batch = batch.contiguous(memory_format=torch.channels_last)
        try:
            returned = run(self.model, batch, self._forward_fn)
        finally:
            self._current.reset(token)
        return part.rows(extract(returned, "quantized_model", self._output))

    def arrange(self, gradient_of: Callable[[], Tensor | None]) -> None:
        """From here on, large images come with their channels last, on which CPUs are faster, if the model takes them
        so: if `gradient_of()`, a gradient of the vector on some images, stays the same."""
        if self.at_once == BATCH or self._forward_fn is not None:
            return
        expected, self._channels_last = gradient_of(), True
        try:
            change = (gradient_of() - expected).norm() / expected.norm()
            self._channels_last = bool(change < SAME)
        except Exception:  # a model that wants its images in the usual order says so in any way
            self._channels_last = False

    def corrections(self, vector: Tensor) -> dict[str, ChannelAffine]:
        """The corrections of `vector` as modules, by the names of layers."""
        parts = self._split(vector.detach())
        return {
            place.name: ChannelAffine(scale.clone(), shift.clone(), place.axis)
            for place, (scale, shift) in zip(self.places, parts, strict=True)
        }

    def reached(self, gradient: Tensor | None) -> list[bool]:
        """Which layers a gradient of the vector reaches."""
        if gradient is None:
            return [False] * len(self.places)
        parts = (part.split(self._sizes) for part in gradient.chunk(2))
        return [bool(scale.abs().sum() + shift.abs().sum() > 0) for scale, shift in zip(*parts, strict=True)]

    def _split(self, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        deviations, offsets = vector.chunk(2)
        scales, shifts = (1 + deviations).split(self._sizes), (offsets * self._spread).split(self._sizes)
        return list(zip(scales, shifts, strict=True))


class _Hook:
    """Forward hook that applies the current correction of layer `index`."""

    def __init__(self, network: CorrectedNetwork, index: int, axis: int) -> None:
        self._network, self._index, self._axis = network, index, axis

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        current = self._network._current.get()
        if current is None:
            return None
        scale, shift = current[self._index]
        return with_first_changed(output, lambda x: _corrected(x, scale, shift, self._axis))


def _corrected(x: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
    """`per_channel` in the dtype of `x`; as a batch norm, one kernel a direction, where the axis is that of one."""
    if axis == 1 - x.ndim and x.dtype == scale.dtype and type(x) is Tensor:
        return F.batch_norm(x, torch.zeros_like(shift), torch.ones_like(scale), scale, shift, eps=NO_EPS)
    return per_channel(x, scale, shift, axis).to(x.dtype)
