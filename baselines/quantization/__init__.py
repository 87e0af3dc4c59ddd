"""Bit widths, ranges, quantizers and the layers that carry them."""
