"""Post-training quantization baselines on one reconstruction engine."""

from baselines.api import METHODS, quantize
from baselines.quantization.specs import QuantSpec
from baselines.summary import QuantizationSummary, summarize

__all__ = ["METHODS", "QuantSpec", "QuantizationSummary", "quantize", "summarize"]
