"""Architecture families of timm and torchvision, quantized at a small size with random weights."""
