"""Post-training quantization baselines on one reconstruction engine."""

from .api import METHODS, quantize
from .specs import QuantSpec

__all__ = ["METHODS", "QuantSpec", "quantize"]
