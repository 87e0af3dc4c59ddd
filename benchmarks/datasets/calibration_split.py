"""The split of training images into those that quantization sees and those that corrections are fitted on."""

import torch
from torch import Tensor

from benchmarks import BenchmarkError


def split_calibration(n_train: int, n_calib: int, n_cat: int, seed: int) -> tuple[Tensor, Tensor]:
    """Disjoint random indices of training images: `(n_calib,)` for quantization and `(n_cat,)` for CAT.

    Raises:
        BenchmarkError: a number below 1, or fewer training images than both parts need together.
    """
    if n_calib < 1 or n_cat < 1:
        raise BenchmarkError(f"numbers of images must be at least 1, got n_calib={n_calib}, n_cat={n_cat}")
    if n_calib + n_cat > n_train:
        raise BenchmarkError(
            f"n_calib={n_calib} plus n_cat={n_cat} needs {n_calib + n_cat} training images, there are {n_train}; lower "
            "--n-calib or --n-cat"
        )
    order = torch.randperm(n_train, generator=torch.Generator().manual_seed(seed))
    return order[:n_calib], order[n_calib : n_calib + n_cat]
