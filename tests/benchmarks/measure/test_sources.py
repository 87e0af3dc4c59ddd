from dataclasses import replace

import numpy as np
import pytest
import torch

from baselines import quantize
from benchmarks import BenchmarkError
from benchmarks.datasets.data import split_calibration
from benchmarks.measure import sources
from benchmarks.measure.evaluate import Protocol, Setting
from benchmarks.measure.sources import file_sources, network_sources, read_npz
from benchmarks.networks.models import create_model
from cat_plugin import CATError
from tests.benchmarks.logits import make_arrays, write_npz

PROTOCOL = Protocol(iters=2, n_calib=16, n_cat=24, batch_size=8)
GRID = [Setting("rtn", 4, 4, 0), Setting("rtn", 2, 4, 1)]


@pytest.fixture(scope="module")
def model():
    return create_model("resnet8", 10, seed=1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_after_the_skipped_ones_come_as_float32(tmp_path, dtype):
    arrays = make_arrays(30, dtype=dtype)
    np.savez(tmp_path / "a.npz", **arrays, h_calib=np.zeros(3))
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


def collect(dataset, model, cache, grid=GRID, **options):
    return network_sources(grid, replace(PROTOCOL, **options), dataset, "resnet8", model, cache)


def test_logits_are_those_of_the_training_images_that_quantization_did_not_see(dataset, model, tmp_path):
    found = collect(dataset, model, tmp_path)
    assert [source.name for source in found] == ["noise-resnet8-rtn-w4a4-seed0", "noise-resnet8-rtn-w2a4-seed1"]
    for source, setting in zip(found, GRID, strict=True):
        calib, rest = split_calibration(40, 16, 24, setting.seed)
        quantized = quantize(model, dataset.train_images[calib], method="rtn", w_bits=setting.w_bits, a_bits=4)
        pairs = source.load()
        assert source.fresh == 24 and not set(calib.tolist()) & set(rest.tolist())
        with torch.no_grad():
            for values, network, images in [
                (pairs.fit_q, quantized, dataset.train_images[rest]),
                (pairs.fit_f, model, dataset.train_images[rest]),
                (pairs.test_q, quantized, dataset.test_images),
                (pairs.test_f, model, dataset.test_images),
            ]:
                torch.testing.assert_close(values, network(images))
        assert torch.equal(pairs.labels, dataset.test_labels)


@pytest.fixture
def runs(monkeypatch):
    """The settings whose networks were really run."""
    settings, real = [], sources.paired_logits

    def spy(setting, *args, **options):
        settings.append(setting)
        return real(setting, *args, **options)

    monkeypatch.setattr(sources, "paired_logits", spy)
    return settings


def test_networks_run_once(dataset, model, tmp_path, runs):
    first = collect(dataset, model, tmp_path)
    again = collect(dataset, model, tmp_path)
    assert runs == GRID
    assert [source.digest for source in again] == [source.digest for source in first]


@pytest.mark.parametrize("change", ["protocol", "draws", "weights", "test images"])
def test_any_change_runs_them_again(dataset, model, tmp_path, runs, change):
    collect(dataset, model, tmp_path, GRID[:1])
    if change == "weights":
        model = create_model("resnet8", 10, seed=2)
    if change == "test images":
        dataset = replace(dataset, test_images=dataset.test_images + 1)
    options = {"protocol": {"n_calib": 12}, "draws": {"n_cat": 20}}.get(change, {})
    collect(dataset, model, tmp_path, GRID[:1], **options)
    assert runs == 2 * GRID[:1]


def test_damaged_logits_are_replaced(dataset, model, tmp_path, runs, caplog):
    (first,) = collect(dataset, model, tmp_path, GRID[:1])
    (path,) = (tmp_path / "logits").iterdir()
    path.write_bytes(path.read_bytes()[:50])
    (again,) = collect(dataset, model, tmp_path, GRID[:1])
    assert "the stored logits are unusable" in caplog.text
    assert runs == 2 * GRID[:1] and again.digest == first.digest
