"""scikit-learn's handwritten digits."""

import numpy as np
import torch
from sklearn.datasets import load_digits as sklearn_digits
from sklearn.model_selection import train_test_split
from torchvision.transforms.functional import normalize

from benchmarks.datasets.dataset import Dataset
from benchmarks.datasets.description import Description

# Mean and standard deviation of the pixels of the training images, pixel / 16.
DIGITS_MEAN, DIGITS_STD = (0.305,), (0.376,)
DIGITS_TEST_IMAGES = 500
DIGITS_SPLIT_SEED = 0


def load_digits() -> Dataset:
    """scikit-learn's handwritten digits, 8x8 grey: 1,297 training and 500 test images, every class in proportion."""
    digits = sklearn_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)),
        test_size=DIGITS_TEST_IMAGES,
        stratify=digits.target,
        random_state=DIGITS_SPLIT_SEED,
    )
    images = normalize(torch.from_numpy(digits.images).float().unsqueeze(1) / 16, DIGITS_MEAN, DIGITS_STD)
    labels = torch.from_numpy(digits.target).long()
    return Dataset(
        name=DIGITS.name,
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        classes=tuple(str(name) for name in digits.target_names),
    )


DIGITS = Description(
    name="digits",
    title="scikit-learn's digits",
    load=lambda request: load_digits(),
    output_count=lambda request, known: 10,
    image_shape=(1, 8, 8),
    iters=250,
    n_calib=256,
    bundled_with="scikit-learn",
    network_is_trained=True,
)
