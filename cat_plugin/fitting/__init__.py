"""Maps from quantized to full-precision logits, and the evidence for them."""
