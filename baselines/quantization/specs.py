"""What to quantize and how finely: a value, validated once, that every other file reads."""

from dataclasses import dataclass

OFF = 32
"""The bit width that means "leave in floating point"."""

RANGE_METHODS = ("mse", "minmax")


def check_bits(name: str, bits: int) -> None:
    """Raise `ValueError` unless `bits` is 2 to 8, or 32 (off)."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not (2 <= bits <= 8 or bits == OFF):
        raise ValueError(f"{name}={bits!r} should be an integer from 2 to 8, or {OFF} to leave it in floating point")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Bit widths and the search for ranges.

    | field | meaning |
    |---|---|
    | `w_bits`, `a_bits` | bits of weights and activations: 2 to 8, or 32 to leave them in floating point |
    | `edge_bits` | bits of the weights of first layers and of the weights and inputs of last layers |
    | `range_method` | `"mse"` (smallest p-norm error, p = 2.4) or `"minmax"` |

    Quantizers are uniform and asymmetric; weights have one range per output channel, activations one per tensor.

    Raises:
        ValueError: a bit width or a method that is not one of these.

    >>> from baselines import QuantSpec
    >>> spec = QuantSpec(w_bits=2, a_bits=4)
    >>> spec.weight_bits(is_edge=False), spec.weight_bits(is_edge=True)
    (2, 8)
    """

    w_bits: int = 4
    a_bits: int = 4
    edge_bits: int = 8
    range_method: str = "mse"

    def __post_init__(self) -> None:
        for name in ("w_bits", "a_bits", "edge_bits"):
            check_bits(name, getattr(self, name))
        if self.range_method not in RANGE_METHODS:
            raise ValueError(f"range_method={self.range_method!r} should be one of {', '.join(RANGE_METHODS)}")

    def weight_bits(self, is_edge: bool) -> int:
        """Bits of a layer's weights; `is_edge` for first and last layers, see `baselines.network.edges`."""
        return self.edge_bits if is_edge and self.w_bits != OFF else self.w_bits

    def activation_bits(self, is_last: bool) -> int:
        """Bits of a layer's input; `is_last` for last layers."""
        return self.edge_bits if is_last and self.a_bits != OFF else self.a_bits
