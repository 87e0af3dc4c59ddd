"""What becomes of one network when it is quantized: what is left, how large the error is, and what can be done then."""

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from baselines import quantize, summarize
from baselines.network.attention import Product
from baselines.quantization.layers import QuantLayer
from cat_plugin import CATWrapper, ClusterAffine

IMAGES = 8
OPTIONS = {"batch_size": 8, "range_method": "minmax"}  # the search for ranges takes minutes for large layers


@dataclasses.dataclass(kw_only=True)
class Row:
    """One network in the table.

    Attributes:
        layers, products: how many are quantized.
        left: what stays in floating point although one would expect it to be quantized.
        reason: what that is, in words.
        share: of the multiplications in convolutions and products that are quantized ones; those of recurrent layers
            are not counted.
        error, plain_error: of W8A8 by `baselines` and by `plain_quantized`, against the norm of the FP outputs.
        state, files, export: whether the state of one network makes another the same, whether safetensors and
            `torch.save` bring it back, and whether the baked network is exported; else the reason why not.
        failure: why there is nothing of all this.
    """

    family: str
    name: str
    size: int
    layers: int = 0
    products: int = 0
    left: tuple[str, ...] = ()
    reason: str = ""
    share: float = 0.0
    error: float = float("nan")
    plain_error: float = float("nan")
    state: str = ""
    files: str = ""
    export: str = ""
    failure: str = ""
    seconds: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether every layer is quantized."""
        return not self.failure and not self.left


def examine(family: str, name: str, size: int, build: Callable[[], nn.Module]) -> Row:
    """Quantizes the network by RTN at W8A8 and by QDrop at W4A4 in three steps."""
    row, start = Row(family=family, name=name, size=size), time.perf_counter()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            images = torch.randn(IMAGES, 3, size, size)
            model = lively(build(), images)
        _fill(row, model, images)
    except Exception as error:  # of whatever kind: the table says which
        row.failure = _said(error)
    row.seconds = time.perf_counter() - start
    return row


def _fill(row: Row, model: nn.Module, images: Tensor) -> None:
    close = quantize(model, images, method="rtn", w_bits=8, a_bits=8, **OPTIONS)
    with torch.no_grad():
        expected = logits(model(images))
        row.error = _relative(logits(close(images)), expected)
        row.plain_error = _relative(logits(plain_quantized(model, images)(images)), expected)
    row.share = quantized_share(close, images[:1])
    del close
    learned = quantize(model, images, method="qdrop", w_bits=4, a_bits=4, iters=3, **OPTIONS)
    summary = summarize(learned)
    row.layers, row.products = len(summary.layers), len(summary.products)
    row.left = summary.floating_point.unquantized
    other = scrambled(learned)
    row.state = _tried(lambda: _loads(other, learned, learned.state_dict(), images[:2]))
    row.files = _tried(lambda: _saves(learned, images[:2]))
    row.export = _tried(lambda: _exports(learned, images))


def lively(model: nn.Module, images: Tensor) -> nn.Module:
    """`model` in eval mode with weights such that every layer counts: networks are initialised with zeros at the ends
    of their branches, and to means and variances that no activation has."""

    def settle(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(args[0].transpose(0, 1).flatten(1), 1)
        if norm.running_mean is not None:
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance + 1e-3)

    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() < 2:
                value.normal_(0, 0.1) if "bias" in name else value.uniform_(0.5, 1.5)
            else:
                value.normal_(0, 0.2 if len(value) == 1 else value[0].numel() ** -0.5)
        norms = [m for m in model.eval().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        handles = [norm.register_forward_pre_hook(settle) for norm in norms]
        model(images)
        for handle in handles:
            handle.remove()
    return model


def plain_quantized(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy of `model` that shares nothing with `baselines`: hooks round weights and inputs of convolutions and linear
    layers to 8 bits between their extremes; batch norms and products of activations stay as they are."""
    twin = copy.deepcopy(model)
    layers = [m for m in twin.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def watch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        low, high = args[0].aminmax()
        old = seen.get(layer, (low, high))
        seen[layer] = torch.minimum(low, old[0]), torch.maximum(high, old[1])

    def rounded(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_round(args[0], *seen[layer]), *args[1:]) if layer in seen else args

    with torch.no_grad():
        handles = [layer.register_forward_pre_hook(watch) for layer in layers]
        twin(images)
        for handle in handles:
            handle.remove()
        for layer in layers:
            rows = layer.weight.flatten(1)
            low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
            layer.weight.copy_(_round(rows, low, high).view_as(layer.weight))
            layer.register_forward_pre_hook(rounded)
    return twin


def _round(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = ((high - low) / 255).clamp(min=1e-12)
    return ((values - low) / step).round().clamp(0, 255) * step + low


def quantized_share(network: nn.Module, image: Tensor) -> float:
    """Share of the multiplications of matrix products and convolutions that run in quantized layers and products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    counts = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
    root = type(network).__name__
    names = {f"{root}.{name}" for name, m in network.named_modules() if isinstance(m, QuantLayer | Product)}
    return sum(counts.get(name, 0) for name in names) / max(counts["Global"], 1)


def logits(output: object) -> Tensor:
    """The first tensor of what a network gives."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def _loads(other: nn.Module, network: nn.Module, state: dict[str, Tensor], images: Tensor) -> None:
    with torch.no_grad():
        expected = logits(network(images))
        assert not torch.equal(logits(other(images)), expected), "nothing is told apart"
        assert state.keys() == other.state_dict().keys(), "other names"
        _load(other, state)
        assert torch.equal(logits(other(images)), expected), "the loaded network gives other outputs"


def scrambled(network: nn.Module) -> nn.Module:
    """A copy of `network` with other weights and ranges."""
    twin = copy.deepcopy(network)
    values = {name: value for name, value in twin.state_dict().items() if value.is_floating_point()}
    _load(twin, {name: value / 3 for name, value in values.items() if not name.endswith("_extra_state")})
    return twin


def _load(network: nn.Module, values: dict[str, Tensor]) -> None:
    """Files hold no versions of modules, without which some refuse to load, and some networks keep what they compute of
    their weights until the mode changes."""
    state = network.state_dict()
    assert values.keys() <= state.keys()
    state.update(values)
    network.load_state_dict(state)
    network.train().eval()


def _saves(network: nn.Module, images: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        save_file(_of_own_memory(network.state_dict()), path)
        _loads(scrambled(network), network, load_file(path), images)
        path = Path(folder) / "network.pt"
        torch.save(network.state_dict(), path)
        _loads(scrambled(network), network, torch.load(path, weights_only=True), images)


def _of_own_memory(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors takes: layers that the FP network shares, too, are written once for each name; quantizers have
    to be such by themselves."""
    return {name: value if "quantizer" in name else value.contiguous().clone() for name, value in state.items()}


def _exports(network: nn.Module, images: Tensor) -> None:
    network = copy.deepcopy(network)
    with torch.no_grad():
        classes = logits(network(images[:2])).shape[1]
        baked = CATWrapper(network, ClusterAffine.identity(classes)).bake()
        expected = logits(baked(images[:2]))
        exported = torch.export.export(baked, (images[:2],)).module()
        assert _relative(logits(exported(images[:2])), expected) < 1e-3, "the exported network gives other outputs"


def _tried(action: Callable[[], None]) -> str:
    try:
        action()
    except Exception as error:
        return _said(error)
    return "yes"


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160]


def table(rows: list[Row]) -> Iterator[str]:
    """Lines of a Markdown table, and of what is left or fails."""
    numbers = ("size", "layers", "products", "left", "quantized", "W8A8", "plain W8A8")
    yield f"| {' | '.join(['family', 'network', *numbers, 'state', 'files', 'export'])} |"
    yield f"| {' | '.join(['---'] * 2 + ['---:'] * len(numbers) + ['---'] * 3)} |"
    for row in rows:
        marks = [mark if mark in ("yes", "") else "no" for mark in (row.state, row.files, row.export)]
        figures = [f"{100 * row.share:.1f} %", f"{100 * row.error:.1f} %", f"{100 * row.plain_error:.1f} %"]
        if row.failure:
            figures, marks = ["-"] * 3, ["-"] * 3
        counts = [str(row.size), str(row.layers), str(row.products), str(len(row.left))]
        yield f"| {' | '.join([row.family, row.name, *counts, *figures, *marks])} |"
    yield ""
    whole = sum(row.whole for row in rows)
    yield f"{whole} of {len(rows)} families with every layer quantized ({100 * whole / max(len(rows), 1):.0f} %)."
    yield ""
    for row in rows:
        reasons = {"state": row.state, "files": row.files, "export": row.export}
        left = f"{', '.join(row.left[:2])}{' ...' if len(row.left) > 2 else ''}"
        said = [f"left: {row.reason or 'unknown'} ({left})"] if row.left else []
        said += [f"{key}: {text}" for key, text in reasons.items() if text not in ("yes", "")]
        said += [row.failure] if row.failure else []
        if said:
            yield f"- {row.family} ({row.name}): {'; '.join(said)}"
