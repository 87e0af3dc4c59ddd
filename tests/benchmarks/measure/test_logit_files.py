import numpy as np
import pytest
import torch

from benchmarks import BenchmarkError
from benchmarks.measure.logit_files import file_sources, read_npz
from cat_plugin import CATError
from tests.benchmarks.logits import make_arrays, write_npz


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_after_the_skipped_ones_come_as_float32(tmp_path, dtype):
    arrays = make_arrays(30, dtype=dtype)
    np.savez(tmp_path / "a.npz", **arrays, more=np.zeros(3))
    pairs = read_npz(tmp_path / "a.npz", skip=10)
    for found, name, rows in [
        (pairs.fit_q, "q_calib", slice(10, None)),
        (pairs.fit_f, "f_calib", slice(10, None)),
        (pairs.test_q, "q_test", slice(None)),
        (pairs.test_f, "f_test", slice(None)),
    ]:
        assert found.dtype == torch.float32
        assert np.array_equal(found.numpy(), arrays[name][rows].astype(np.float32))
    assert np.array_equal(pairs.labels.numpy(), arrays["y_test"])


def test_every_file_of_the_folders_is_a_source(tmp_path):
    for index, name in enumerate(("one/b.npz", "one/a.npz", "two/c.npz")):
        write_npz(tmp_path / name, 20 + index, seed=index)
    found = file_sources([tmp_path / "one", tmp_path / "two"], skip=5)
    assert [(source.name, source.fresh) for source in found] == [("a", 16), ("b", 15), ("c", 17)]
    assert len({source.digest for source in found}) == 3
    assert len(found[1].load().fit_q) == 15
    assert file_sources([tmp_path / "one"], skip=6)[0].digest != found[0].digest


def changed(**values):
    return {name: array for name, array in (make_arrays(30) | values).items() if array is not None}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (changed(f_test=None), "f_test is not a file in the archive; expected q_calib, f_calib"),
        (changed(q_calib=np.zeros((29, 5), np.float32)), r"do not fit together: q_calib \(29, 5\) float32"),
        (changed(q_test=np.zeros((300, 4), np.float32)), "do not fit together"),
        (changed(y_test=np.zeros(300)), "do not fit together"),
        (changed(y_test=np.array(3)), "do not fit together"),
        (changed(q_calib=np.zeros(30, np.float32)), "do not fit together"),
        (changed(q_test=np.zeros((299, 5), np.float32)), "do not fit together"),
        (changed(**{name: np.zeros((0, 5), np.float32) for name in ("q_calib", "f_calib")}), "do not fit together"),
        (changed(y_test=np.full(300, 5)), "y_test runs from 5 to 5, there are 5 classes"),
        (changed(q_calib=np.zeros((30, 5), int)), "do not fit together"),
        (changed(y_test=np.array([{}] * 300, dtype=object)), "cannot be read as an npz file of plain arrays"),
        (changed(**{n: make_arrays(10)[n] for n in ("q_calib", "f_calib")}), "none of 10 rows is left after --skip 10"),
    ],
)
def test_unusable_arrays_are_errors_of_the_user(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(BenchmarkError, match=message):
        file_sources([tmp_path], skip=10)


def test_logits_that_are_not_finite_are_refused(tmp_path):
    arrays = make_arrays(30)
    arrays["f_test"][3, 2] = np.nan
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CATError, match=r"a.npz: f_test gave 1 NaN"):
        file_sources([tmp_path], skip=10)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_damaged_files_are_errors_of_the_user(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(BenchmarkError, match="cannot be read as an npz file"):
        file_sources([tmp_path], skip=0)


@pytest.mark.parametrize("name", ["missing", "."])
def test_folder_without_files_is_an_error_of_the_user(tmp_path, name):
    with pytest.raises(BenchmarkError, match=r"holds no \*.npz files"):
        file_sources([tmp_path / name], skip=0)


def test_array_file_under_another_name_is_refused(tmp_path):
    with (tmp_path / "a.npz").open("wb") as opened:
        np.save(opened, np.zeros(3))
    with pytest.raises(BenchmarkError, match="cannot be read as an npz file"):
        file_sources([tmp_path], skip=0)
