"""What makes a fit doubtful, in words that say what to do."""

import math

import torch
from torch import Tensor

from cat_plugin.kinds import SOFTMAX, VALUE, OutputKind

FEW_IMAGES = 256
REUSED_SHARE = 0.5
REPEATED_SHARE = 0.05
ENOUGH_IMAGES = 32
"""To judge how two models go together."""
ENOUGH_APART = 5
"""Images on which two models would disagree by chance, to judge whether they agree more often."""
COLLAPSED_SHARE = 0.5
ONE_CLASS_SHARE = 0.9
"""Of the images, from which on it is no surprise that one class is predicted for all of them."""


def find_warnings(
    f: Tensor, n_images: int, repeated: int = 0, reused: float | None = None, kind: OutputKind = SOFTMAX
) -> list[str]:
    """Sentences about images that are few, repeated, of few classes, or the ones that quantization was tuned on.

    Args:
        f: (n, C) logits of the full-precision model for different ones of the images.
        n_images: how many images there are, and repeated: how many of them repeat another.
        reused: share of the images that the quantized model was calibrated on, if known.
        kind: what outputs mean; only those of classes that exclude each other tell how many classes were seen.
    """
    sampled, n_classes = f.shape
    found = []
    if n_images - repeated < FEW_IMAGES:
        found.append(f"{n_images - repeated} different images are few: corrections gain from about a thousand")
    if repeated > REPEATED_SHARE * n_images:
        found.append(f"{repeated} of {n_images} images repeat others and do not count; give different ones")
    seen = len(f.argmax(dim=1).unique())
    expected = n_classes * (1 - (1 - 1 / n_classes) ** sampled)
    if kind is SOFTMAX and seen < expected / 2:
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


def find_output_warnings(q: Tensor, f: Tensor, kind: OutputKind | None = None) -> list[str]:
    """Sentences about models that do not go together: outputs that are identical, that agree no more often than chance
    would have it, that are probabilities or of another kind, or of which the quantized ones have collapsed.

    Args:
        q, f: (n, C) logits of the quantized and of the full-precision model for the same images.
        kind: what they mean; None: nobody said.
    """
    if torch.equal(q, f):
        return [
            f"both models give identical outputs for all {len(q)} images: nothing is quantized or quantization is "
            "switched off, or it changed fp_model, too; quantize a copy.deepcopy of it"
        ]
    found = []
    for name, outputs in (("quantized_model", q), ("fp_model", f)):
        what = "" if kind is VALUE else _probabilities(outputs)
        if what:
            found.append(
                f"{name} gives probabilities ({what}); corrections are made for logits: give what comes before it"
            )
    if kind is None and f.shape[1] == 2 and not f[:, 0].any() and not q[:, 0].any():
        found.append(
            "single outputs were taken for logits of the second of two classes; say output_kind='value' if they are "
            "values, or output_kind='softmax' to confirm"
        )
    if kind is None and not found and _may_be_labels(f):
        found.append(
            "most logits of fp_model are far below 0, as where labels do not exclude each other; if so, say "
            "output_kind='sigmoid', else 'softmax'"
        )
    if kind not in (None, SOFTMAX):
        return found
    n_images, n_classes = q.shape
    if n_classes < 2 or n_images < ENOUGH_IMAGES:
        return found
    theirs, ours = q.argmax(dim=1), f.argmax(dim=1)
    shares = [torch.bincount(predicted, minlength=n_classes).double() / n_images for predicted in (theirs, ours)]
    chance, error = _chance(*shares)
    agreeing = (theirs == ours).double().mean().item()
    most = shares[0].max().item()
    full = shares[1].max().item()
    if most > COLLAPSED_SHARE and (most > 2 * full or (most == 1 and full < ONE_CLASS_SHARE)):
        found.append(
            f"quantized_model has collapsed: it predicts class {int(shares[0].argmax())} for {most:.0%} of the images, "
            f"FP its most frequent one for {full:.0%}; look at its ranges, or give it more bits"
        )
    elif (
        max(most, full) < 1  # else nothing can be told
        and n_images * (1 - chance) >= ENOUGH_APART
        and agreeing <= chance + 3 * error / math.sqrt(n_images - 1)
    ):
        found.append(
            f"the models agree on {agreeing:.1%} of the images, where chance has {chance:.1%}: look at preprocessing, "
            "at the weights and at the order of classes of both, and whether quantized_model was made from fp_model"
        )
    return found


def _chance(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """How often predictions with these shares (C,) of classes agree when they are paired at random, and the standard
    deviation of that times sqrt(n - 1): the exact one over all pairings, which is small where one class is frequent."""
    both = ours * theirs
    chance = both.sum()
    variance = chance - (both * (ours + theirs)).sum() + chance.square()
    return chance.item(), math.sqrt(max(variance.item(), 0.0))


def _probabilities(outputs: Tensor) -> str:
    """By what outputs (n, C) look like probabilities; empty if they do not."""
    if outputs.shape[1] < 2 or not ((outputs >= 0) & (outputs <= 1 + 1e-2)).all():
        return ""
    if ((outputs.sum(dim=1) - 1).abs() < 1e-2).all():
        return "all rows add up to 1, as after a softmax"
    return "all are between 0 and 1, as after a sigmoid"


def _may_be_labels(f: Tensor) -> bool:
    """Whether logits (n, C) look like those of labels that do not exclude each other: nearly all say no, by far.

    A softmax does not see what all logits of an image have in common, so that training leaves their mean near 0.
    """
    if f.shape[1] < 3:
        return False
    return bool((f < 0).double().mean() > 0.75 and (f.mean(dim=1) < -f.std(dim=1)).double().mean() > 0.5)
