"""What of a network is quantized, at how many bits, and what stays in floating point."""

from collections import Counter
from dataclasses import asdict, dataclass

from torch import nn

from baselines.network.attention import Product
from baselines.network.floating_point import FloatingPoint
from baselines.quantization.layers import QuantLayer, quantized_layers
from baselines.quantization.quantizers import ActivationQuantizer
from baselines.quantization.specs import OFF


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One quantized layer: its `name` and `kind`, how many `weights` it has, and bits (32: floating point)."""

    name: str
    kind: str
    weights: int
    weight_bits: int
    input_bits: int


@dataclass(frozen=True, kw_only=True)
class ProductSummary:
    """One product of two activations, such as queries and keys, or of an activation and a weight of no layer, with the
    bits of its factors (32: floating point)."""

    name: str
    left_bits: int
    right_bits: int


@dataclass(frozen=True, kw_only=True)
class QuantizationSummary:
    """Rows for each quantized layer and product, and what stays in floating point. `str()` gives a table."""

    layers: tuple[LayerSummary, ...]
    products: tuple[ProductSummary, ...]
    floating_point: FloatingPoint

    @property
    def headline(self) -> str:
        """One line: how many layers and products there are, and at which bits."""
        weights = _counted(Counter(layer.weight_bits for layer in self.layers))
        inputs = _counted(Counter(layer.input_bits for layer in self.layers))
        text = f"{len(self.layers)} layers with {sum(layer.weights for layer in self.layers):,} weights"
        text += f" (weights: {weights}; inputs: {inputs})"
        if self.products:
            factors = Counter(bits for product in self.products for bits in (product.left_bits, product.right_bits))
            text += f", {len(self.products)} products (factors: {_counted(factors)})"
        return text

    def to_dict(self) -> dict[str, object]:
        """The same as dicts, lists, strings and numbers, ready for JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "products": [asdict(product) for product in self.products],
            "floating_point_operations": dict(self.floating_point.operations),
            "unquantized": list(self.floating_point.unquantized),
        }

    def __str__(self) -> str:
        rows = [("name", "kind", "weights", "weight bits", "input bits")]
        rows += [
            (row.name, row.kind, f"{row.weights:,}", _bits(row.weight_bits), _bits(row.input_bits))
            for row in self.layers
        ]
        rows += [
            (row.name, "product", "", "", f"{_bits(row.left_bits)}, {_bits(row.right_bits)}") for row in self.products
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        operations = ", ".join(f"{name} x{count}" for name, count in self.floating_point.operations.items())
        left = ", ".join(self.floating_point.unquantized)
        return "\n".join(
            [
                *(self.headline, "", *lines, ""),
                f"operations in floating point: {operations or 'none'}",
                f"left unquantized: {left or 'nothing'}",
            ]
        )


def summarize(model: nn.Module) -> QuantizationSummary:
    """What of `model` is quantized.

    Args:
        model: what `baselines.quantize` returned, or a module that holds it.

    Raises:
        ValueError: nothing in `model` is quantized.

    >>> import torch
    >>> from torch import nn
    >>> from baselines import quantize, summarize
    >>> fp_model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> print(summarize(quantize(fp_model, torch.randn(64, 8), method="rtn")).headline)
    2 layers with 192 weights (weights: 2 at 8 bits; inputs: 1 at 8 bits, 1 at FP)
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no quantized layer; give the network that baselines.quantize returned"
        )
    products = {name: module for name, module in model.named_modules() if isinstance(module, Product)}
    stays = next((vars(m)["floating_point"] for m in model.modules() if "floating_point" in vars(m)), FloatingPoint())
    return QuantizationSummary(
        layers=tuple(_layer(name, layer) for name, layer in layers.items()),
        products=tuple(
            ProductSummary(name=name, left_bits=_of(p.left_quantizer), right_bits=_of(p.right_quantizer))
            for name, p in products.items()
        ),
        floating_point=stays,
    )


def _layer(name: str, layer: QuantLayer) -> LayerSummary:
    return LayerSummary(
        name=name,
        kind=type(layer).__name__.removeprefix("Quant"),
        weights=layer.weight.numel(),
        weight_bits=OFF if layer.weight_quantizer is None else layer.weight_quantizer.bits,
        input_bits=OFF if layer.input_bits is None else layer.input_bits,
    )


def _of(quantizer: ActivationQuantizer | None) -> int:
    return OFF if quantizer is None else quantizer.bits


def _bits(bits: int) -> str:
    return "FP" if bits == OFF else str(bits)


def _counted(bits: Counter[int]) -> str:
    return ", ".join(f"{count} at {_bits(b) if b == OFF else f'{b} bits'}" for b, count in sorted(bits.items()))
