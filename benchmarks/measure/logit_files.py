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
from cat_plugin.running.checks import check_finite

LOGITS = ("q_calib", "f_calib", "q_test", "f_test")
LABELS = "y_test"


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

    The first `skip` rows of `*_calib` are the images that quantization was tuned on. Other arrays are not read.

    Raises:
        BenchmarkError: no readable file of arrays (pickled objects are refused), arrays that are missing or do not
            fit together, no row left, or a test image among the others.
        CATError: logits that are not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in (*LOGITS, LABELS)}
    except KeyError as error:
        raise BenchmarkError(f"{path}: {error.args[0]}; expected {', '.join(LOGITS)} and {LABELS}") from error
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BenchmarkError(f"{path} cannot be read as an npz file of plain arrays: {error}") from error
    _refuse_misfit(arrays, path)
    if len(arrays["q_calib"]) <= skip:
        raise BenchmarkError(f"{path}: none of {len(arrays['q_calib']):,} rows is left after --skip {skip}")
    labels = torch.from_numpy(arrays.pop(LABELS).astype(np.int64))
    values = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    for name, tensor in values.items():
        check_finite(tensor, f"{path}: {name}")
    calib = {name[0]: tensor for name, tensor in values.items() if name.endswith("_calib")}
    test = {name[0]: tensor for name, tensor in values.items() if name.endswith("_test")}
    pairs = PairedLogits(
        **{f"fit_{name}": tensor[skip:] for name, tensor in calib.items()},
        **({f"tuned_{name}": tensor[:skip] for name, tensor in calib.items()} if skip else {}),
        **{f"test_{name}": tensor for name, tensor in test.items()},
        labels=labels,
    )
    pairs.refuse_leaks(f"{path}: ")
    return pairs


def _refuse_misfit(arrays: dict[str, np.ndarray], path: Path) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    kinds = {name: np.integer if name == LABELS else np.floating for name in arrays}
    columns = {name: shapes[name][1:] for name in arrays if name != LABELS}
    fits = (
        len(shapes[LABELS]) == 1
        and all(np.issubdtype(arrays[name].dtype, kind) for name, kind in kinds.items())
        and all(len(shape) == 1 and shape[0] > 0 for shape in columns.values())
        and all(0 < len(arrays[name]) == len(arrays[f"q_{name[2:]}"]) for name in arrays)
        and all(columns[name] == columns[f"{name[0]}_test"] for name in columns)
        and columns["q_test"] == columns["f_test"]
    )
    if not fits:
        found = ", ".join(f"{name} {shape} {arrays[name].dtype}" for name, shape in shapes.items())
        raise BenchmarkError(
            f"{path}: the arrays do not fit together: {found}; expected floating-point q_calib and f_calib (N, C), "
            "q_test and f_test (M, C), and integer y_test (M,)"
        )
    low, high, classes = arrays[LABELS].min(), arrays[LABELS].max(), shapes["q_test"][1]
    if low < 0 or high >= classes:
        raise BenchmarkError(f"{path}: {LABELS} runs from {low} to {high}, there are {classes} classes")
