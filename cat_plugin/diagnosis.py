"""What makes a fit doubtful, in words that say what to do."""

import hashlib

import torch
from torch import Tensor, nn

FEW_IMAGES = 256
REUSED_SHARE = 0.5
REPEATED_SHARE = 0.05


def find_warnings(f: Tensor, n_images: int, repeated: int = 0, reused: float | None = None) -> list[str]:
    """Sentences about images that are few, repeated, of few classes, or the ones that quantization was tuned on.

    Args:
        f: (n, C) logits of the full-precision model for different ones of the images.
        n_images: how many images there are, and repeated: how many of them repeat another.
        reused: share of the images that the quantized model was calibrated on, if known.
    """
    sampled, n_classes = f.shape
    found = []
    if n_images - repeated < FEW_IMAGES:
        found.append(f"{n_images - repeated} different images are few: corrections gain from about a thousand")
    if repeated > REPEATED_SHARE * n_images:
        found.append(f"{repeated} of {n_images} images repeat others and do not count; give different ones")
    seen = len(f.argmax(dim=1).unique())
    expected = n_classes * (1 - (1 - 1 / n_classes) ** sampled)
    if seen < expected / 2:
        found.append(
            f"FP predicts {seen} of {n_classes} classes for these images, where a random sample has about "
            f"{expected:.0f}; shuffle them, so that the correction is not fitted to a few classes (or look at "
            "preprocessing and the FP weights)"
        )
    if reused is not None and reused >= REUSED_SHARE:
        found.append(
            f"{reused:.0%} of the images are those that the quantization was calibrated on: its error there is smaller "
            "than elsewhere, so agreement is flattered and the correction too timid; give fresh images"
        )
    return found


def image_digests(images: Tensor) -> list[str]:
    """What tells images (N, ...) apart: SHA-256 of the float32 bytes of each, the first 16 hexadecimal digits."""
    flat = images.detach().to("cpu", torch.float32).contiguous().reshape(len(images), -1)
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in flat]


def known_calibration(model: nn.Module) -> frozenset[str] | None:
    """The `image_digests` that a quantizer left in the attribute `calibration_digests` of its model, if it did."""
    digests = getattr(model, "calibration_digests", None)
    return frozenset(digests) if isinstance(digests, set | frozenset) and digests else None
