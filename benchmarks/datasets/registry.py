"""The data sets by name: how their images are had, and what options mean for them."""

from benchmarks.datasets.cifar10 import CIFAR10
from benchmarks.datasets.description import Description
from benchmarks.datasets.digits import DIGITS
from benchmarks.datasets.imagenet import IMAGENET

DATASETS: dict[str, Description] = {each.name: each for each in (DIGITS, CIFAR10, IMAGENET)}
DEFAULT_DATASET = DIGITS.name
"""It needs neither files nor a download."""
