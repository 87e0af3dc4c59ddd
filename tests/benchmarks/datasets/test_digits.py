import pytest
import torch

from benchmarks.datasets.digits import load_digits


def test_digits_are_split_in_proportion():
    digits = load_digits()
    assert digits.train_images.shape == (1297, 1, 8, 8)
    assert digits.test_images.shape == (500, 1, 8, 8)
    assert digits.test_labels.bincount().tolist() == pytest.approx([50] * 10, abs=2)
    assert len(digits.classes) == 10
    assert digits.train_images.mean().item() == pytest.approx(0, abs=0.01)
    assert digits.train_images.std().item() == pytest.approx(1, abs=0.01)


def test_digits_test_images_are_not_among_the_training_images():
    digits = load_digits()
    distances = torch.cdist(digits.test_images.flatten(1), digits.train_images.flatten(1))
    assert distances.min() > 0
    assert load_digits().digest() == digits.digest()
