"""Paired logits that other tools have made, from npz files."""

import zipfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import BenchmarkError
from benchmarks.measure.paired_logits import PairedLogits, Source
from cat_plugin.running.collect import check_finite

LOGITS = ("q_calib", "f_calib", "q_test", "f_test")
FEATURES = ("h_calib", "h_test")


def file_sources(folders: Sequence[Path], skip: int) -> list[Source]:
    """All `*.npz` files of the folders, see `read_npz`, named after the files.

    Raises:
        BenchmarkError: a folder without such files, or files that cannot be used.
    """
    found = []
    for folder in folders:
        paths = sorted(folder.glob("*.npz"))
        if not paths:
            raise BenchmarkError(f"{folder} holds no *.npz files of logits; expected a folder of them")
        for path in paths:
            load = partial(read_npz, path, skip)
            found.append(Source.of(path.stem, load(), load))
    return found


def read_npz(path: Path, skip: int) -> PairedLogits:
    """Logits from a file with the arrays `q_calib, f_calib (N, C)`, `q_test, f_test (M, C)` and `y_test (M,)`.

    The first `skip` rows of `*_calib` are the images that quantization was tuned on. Features `h_calib (N, D)`
    and `h_test (M, D)` of the low-bit network may be there, too.

    Raises:
        BenchmarkError: no readable file of arrays (pickled objects are refused), arrays that are missing or do not
            fit together, no row left, or a test image among the others.
        CATError: logits that are not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in (*LOGITS, "y_test")}
            features = {name: opened[name] for name in FEATURES if all(each in opened for each in FEATURES)}
    except KeyError as error:
        raise BenchmarkError(f"{path}: {error.args[0]}; expected {', '.join(LOGITS)} and y_test") from error
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BenchmarkError(f"{path} cannot be read as an npz file of plain arrays: {error}") from error
    _refuse_misfit(arrays, path)
    _refuse_misfit_of_features(features, arrays, path)
    if len(arrays["q_calib"]) <= skip:
        raise BenchmarkError(f"{path}: none of {len(arrays['q_calib']):,} rows is left after --skip {skip}")
    values = {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in LOGITS}
    values |= {name: torch.from_numpy(array.astype(np.float32)) for name, array in features.items()}
    for name, tensor in values.items():
        check_finite(tensor, f"{path}: {name}")
    calib = {name[0]: tensor for name, tensor in values.items() if name.endswith("_calib")}
    test = {name[0]: tensor for name, tensor in values.items() if name.endswith("_test")}
    pairs = PairedLogits(
        **{f"fit_{name}": tensor[skip:] for name, tensor in calib.items()},
        **({f"tuned_{name}": tensor[:skip] for name, tensor in calib.items()} if skip else {}),
        **{f"test_{name}": tensor for name, tensor in test.items()},
        labels=torch.from_numpy(arrays["y_test"].astype(np.int64)),
    )
    pairs.refuse_leaks(f"{path}: ")
    return pairs


def _refuse_misfit(arrays: dict[str, np.ndarray], path: Path) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    classes = shapes["q_calib"][-1:]
    fits = (
        all(len(shapes[name]) == 2 and shapes[name][1:] == classes and shapes[name][0] > 0 for name in LOGITS)
        and shapes["q_calib"] == shapes["f_calib"]
        and shapes["q_test"] == shapes["f_test"]
        and shapes["y_test"] == shapes["q_test"][:1]
        and all(np.issubdtype(arrays[name].dtype, np.floating) for name in LOGITS)
        and np.issubdtype(arrays["y_test"].dtype, np.integer)
    )
    if not fits:
        found = ", ".join(f"{name} {shape} {arrays[name].dtype}" for name, shape in shapes.items())
        raise BenchmarkError(
            f"{path}: the arrays do not fit together: {found}; expected floating-point q_calib and f_calib (N, C), "
            "q_test and f_test (M, C), and integer y_test (M,)"
        )
    low, high = arrays["y_test"].min(), arrays["y_test"].max()
    if low < 0 or high >= classes[0]:
        raise BenchmarkError(f"{path}: y_test runs from {low} to {high}, there are {classes[0]} classes")


def _refuse_misfit_of_features(features: dict[str, np.ndarray], arrays: dict[str, np.ndarray], path: Path) -> None:
    if not features:
        return
    calib, test = (features[name] for name in FEATURES)
    if (
        not (calib.ndim == test.ndim == 2 and calib.shape[1] == test.shape[1] > 0)
        or (len(calib), len(test)) != (len(arrays["q_calib"]), len(arrays["q_test"]))
        or not all(np.issubdtype(array.dtype, np.floating) for array in features.values())
    ):
        found = ", ".join(f"{name} {array.shape} {array.dtype}" for name, array in features.items())
        raise BenchmarkError(f"{path}: {found} do not fit the logits; expected floating-point (N, D) and (M, D)")
