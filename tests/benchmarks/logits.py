"""Synthetic paired logits: a low-bit network that is off by an affine map and noise."""

from pathlib import Path

import numpy as np

CLASSES = 5
TEST_IMAGES = 300


def make_arrays(n_calib: int, seed: int = 0, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """The arrays of a file of logits; corrections win and lose images, so that no two figures coincide by chance."""
    generator = np.random.default_rng(seed)
    scale, offset = generator.uniform(0.4, 1.6, CLASSES), generator.normal(0, 1, CLASSES)

    def pairs(images):
        f = generator.normal(0, 2, (images, CLASSES))
        q = (f - offset) / scale + generator.normal(0, 0.7, f.shape)
        return q.astype(dtype), f.astype(dtype)

    q_calib, f_calib = pairs(n_calib)
    q_test, f_test = pairs(TEST_IMAGES)
    labels = (f_test + generator.normal(0, 0.5, f_test.shape)).argmax(1)
    return {"q_calib": q_calib, "f_calib": f_calib, "q_test": q_test, "f_test": f_test, "y_test": labels}


def write_npz(path: Path, n_calib: int, seed: int = 0) -> dict[str, np.ndarray]:
    arrays = make_arrays(n_calib, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return arrays
