"""Post-training quantization baselines on one reconstruction engine."""

from baselines.api import METHODS, quantize
from baselines.specs import QuantSpec

__all__ = ["METHODS", "QuantSpec", "quantize"]
