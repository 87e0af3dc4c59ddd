"""Other ways to correct layers than the default's, for `ablate`: what is changed, and the published alternative.

And one step of the default's fit, to be timed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.network.batch_norm_folding import folded_copy
from benchmarks import BenchmarkError
from cat_plugin import ChannelAffine
from cat_plugin.fitting.processes import ALONE
from cat_plugin.kinds import SOFTMAX
from cat_plugin.layers.descent import Descent, Schedule
from cat_plugin.layers.fit import Recipe
from cat_plugin.layers.gradients import fitting_through
from cat_plugin.layers.images import KeptImages, flipped
from cat_plugin.layers.network import CorrectedNetwork
from cat_plugin.layers.place import Place, candidates, measuring, places
from cat_plugin.running.collect import Inputs
from cat_plugin.running.inference import inference
from cat_plugin.running.positions import PositionDraw
from cat_plugin.running.weights import weights_of

EVERY, CONVOLUTIONS, ENDS = "all", "convolutions", "ends of blocks"
WHICH = EVERY, CONVOLUTIONS, ENDS
CLOSED_FORM = "closed form"
BATCH = 128


def shifted(images: Tensor) -> Tensor:
    """Images (n, C, H, W), half of which are mirrored, and each moved by up to an eighth of its size, over zeros."""
    moved, (height, width) = flipped(images), images.shape[-2:]
    down, right = height // 8, width // 8
    padded = F.pad(moved, (right, right, down, down))
    rows = torch.randint(2 * down + 1, (len(images),)).tolist()
    columns = torch.randint(2 * right + 1, (len(images),)).tolist()
    places_of = zip(padded, rows, columns, strict=True)
    return torch.stack([image[:, row : row + height, column : column + width] for image, row, column in places_of])


VIEWS: dict[str, str | Callable[[Tensor], Tensor] | None] = {"none": None, "flipped": "flip", "shifted": shifted}


@dataclass(frozen=True)
class Variation:
    """How layers are corrected, where not by default.

    which: layers, of `WHICH`; views: of the images, of `VIEWS`; closed_form: layer after layer, see `layer_by_layer`.
    """

    recipe: Recipe = field(default_factory=Recipe)
    which: str = EVERY
    views: str = "none"
    closed_form: bool = False


def layers_of(model: nn.Module, which: str, images: Tensor) -> str | tuple[str, ...]:
    """`CATConfig.layers` for one of `WHICH`: of the layers that run on `images` (N, ...), convolutions, or the last one
    inside of each module that holds some.

    Raises:
        BenchmarkError: there are none.
    """
    if which == EVERY:
        return "auto"
    layers = candidates(model, EVERY)
    with inference({"model": model}):
        found = {place.name: layers[place.name] for place in _running(model, layers, images)}
    if which == CONVOLUTIONS:
        names = tuple(name for name, layer in found.items() if any(weight.ndim > 2 for weight in weights_of(layer)))
    else:
        names = tuple({name.rpartition(".")[0]: name for name in found}.values())
    if not names:
        raise BenchmarkError(f"the network has no {which} that can be corrected; leave that value out")
    return names


@contextmanager
def layer_by_layer(quantized: nn.Module, fp_model: nn.Module, images: Tensor) -> Iterator[dict[str, ChannelAffine]]:
    """Inside the block, every layer of `quantized` is corrected by the scale and the offset of each channel that bring
    its output nearest to that of the full-precision layer, in the order of layers, the earlier ones being corrected.

    In the way of QwT-v2 (arXiv 2505.20932): in closed form, by least squares, without a look at the outputs of the
    network. `images` (N, ...) are those to fit on.
    """
    layers = candidates(quantized, EVERY)
    batches = images.split(BATCH)
    with ExitStack() as stack, inference({"quantized": quantized, "fp_model": fp_model}):
        original = folded_copy(fp_model, batches[0][:2])
        originals = dict(original.named_modules())
        corrections = {}
        for place in _running(quantized, layers, batches[0]):
            with _Moments(layers[place.name], originals[place.name], place.axis) as moments:
                for batch in batches:
                    moments.take(quantized, original, batch)
            corrections[place.name] = moments.correction()
            hook = _correcting(corrections[place.name])
            stack.callback(layers[place.name].register_forward_hook(hook).remove)
        yield corrections


def _running(model: nn.Module, layers: dict[str, nn.Module], images: Tensor) -> list[Place]:
    """Those of the layers that run on `images`."""
    with measuring(layers) as measures:
        model(images)
    return places(measures, ALONE)


def _correcting(correction: ChannelAffine) -> Callable[..., Tensor]:
    return lambda module, args, output: correction(output)


class _Moments:
    """What least squares of a layer's output to another layer's need, channel by channel."""

    def __init__(self, layer: nn.Module, other: nn.Module, axis: int) -> None:
        self._layers, self._axis = (layer, other), axis
        self._rows: dict[int, list[Tensor]] = {}
        self._sums = torch.zeros(())

    def __enter__(self) -> "_Moments":
        self._hooks = [layer.register_forward_hook(self._watch(side)) for side, layer in enumerate(self._layers)]
        return self

    def _watch(self, side: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            self._rows.setdefault(side, []).append(self._channels(output))

        return hook

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _channels(self, output: Tensor) -> Tensor:
        """(n, C) float64."""
        return output.movedim(self._axis, -1).flatten(0, -2).double()

    def take(self, network: nn.Module, other: nn.Module, batch: Tensor) -> None:
        """Runs the networks of both layers on a batch; a layer may run several times."""
        self._rows = {}
        network(batch)
        other(batch)
        x, y = (torch.cat(self._rows[side]) for side in range(2))
        self._sums = self._sums + torch.stack([each.sum(0) for each in (torch.ones_like(x), x, y, x * x, x * y)])

    def correction(self) -> ChannelAffine:
        """The best of each channel; one that never changes is shifted."""
        count, x, y, xx, xy = self._sums
        spread = xx / count - (x / count).square()
        known = spread > 1e-12 * xx / count
        scale = torch.where(known, (xy / count - x / count * y / count) / spread, torch.ones_like(spread))
        return ChannelAffine(scale.float(), (y / count - scale * x / count).float(), self._axis)


@contextmanager
def fit_of_layers(quantized: nn.Module, fp_model: nn.Module, images: Tensor) -> Iterator[Callable[[], Tensor]]:
    """Inside the block, what is given takes a step of the default's fit on all `images` (N, ...); both networks stay as
    they are."""
    layers, kept = candidates(quantized, "all"), KeptImages()
    with torch.no_grad():
        f = fp_model(images)
        kept.append(Inputs(images, PositionDraw(None, None, 0)(f)))
        with measuring(layers) as measures:
            quantized(images)
    corrected = CorrectedNetwork(quantized, layers, places(measures, ALONE))
    descent = Descent(corrected, kept, lambda part: f[part.images.to(f.device)], SOFTMAX.divergence, ALONE)
    everything = torch.arange(len(images), device="cpu")
    with fitting_through(quantized), corrected.attached():
        yield lambda: descent.fit(everything, Schedule(1, 1), "near", 0)
