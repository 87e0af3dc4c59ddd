"""Every figure of a row against one computed here, on networks that really lose accuracy."""

import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from baselines import quantize
from benchmarks.datasets.calibration_split import split_calibration
from benchmarks.datasets.digits import load_digits
from benchmarks.measure import leak_guard, network_logits
from benchmarks.measure.accuracy import Measurement, measure, top1
from benchmarks.measure.protocol import Protocol, Setting
from benchmarks.networks.training import Training, trained_model
from cat_plugin import CATConfig, CATWrapper, apply_cat, fit_cluster_affine
from tests.benchmarks.rows import make_measurement, same
from tests.reference import lstsq_per_cluster

STARTED = time.perf_counter()
SETTING = Setting("rtn", 2, 4, seed=3)
PROTOCOL = Protocol(iters=1, n_calib=64, n_cat=256)
OF_LOGITS = ("plain_affine", "cat_paper", "output")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def model(digits, tmp_path_factory):
    return trained_model("resnet8", digits, tmp_path_factory.mktemp("cache"), Training(epochs=4))


@pytest.fixture(scope="module")
def measurement(digits, model):
    return measure(SETTING, PROTOCOL, digits, "resnet8", model, progress=False)


@pytest.fixture(scope="module")
def row(measurement):
    return measurement.row


@pytest.fixture(scope="module")
def parts():
    return split_calibration(1297, 64, 256, seed=3)


@pytest.fixture(scope="module")
def quantized(digits, model, parts):
    return quantize(model, digits.train_images[parts[0]], method="rtn", w_bits=2, a_bits=4, iters=1, seed=3)


@pytest.fixture(scope="module")
def logits(digits, model, quantized, parts):
    """(q, f) on the CAT images, then (q, f) on the test images."""
    cat = parts[1]
    with torch.no_grad():
        return [net(images) for images in (digits.train_images[cat], digits.test_images) for net in (quantized, model)]


def percent_right(logits, labels):
    return 100 * sum(int(row.argmax() == label) for row, label in zip(logits, labels, strict=True)) / len(labels)


def affine_by_lstsq(q, f, test_q):
    """One line a class over all images."""
    slope, offset = lstsq_per_cluster(q.double().numpy(), f.double().numpy(), np.zeros(len(q), dtype=int), 1)
    return torch.from_numpy(slope * test_q.numpy() + offset)


def test_scores_equal_those_by_hand(row, logits, digits):
    q, f, test_q, test_f = logits

    def corrected(config):
        return percent_right(fit_cluster_affine(q, f, config)(test_q), digits.test_labels)

    expected = {
        "fp_top1": percent_right(test_f, digits.test_labels),
        "lq_top1": percent_right(test_q, digits.test_labels),
        "plain_affine_top1": percent_right(affine_by_lstsq(q, f, test_q), digits.test_labels),
        "cat_paper_top1": corrected(CATConfig.paper(num_clusters=64, pca_dim=50, alpha=0.4, seed=3)),
        "output_top1": corrected(CATConfig(layers="none", seed=3)),
    }
    assert {name: getattr(row, name) for name in expected} == pytest.approx(expected)
    assert row.output_delta == pytest.approx(expected["output_top1"] - expected["lq_top1"])


def test_layers_are_those_of_the_librarys_default(row, quantized, model, digits, parts):
    cat_model = apply_cat(quantized, model, digits.train_images[parts[1]], config=CATConfig(seed=3))
    assert cat_model.report.layers.accepted, "without corrections of layers nothing is tested"
    with torch.no_grad():
        top = percent_right(cat_model(digits.test_images), digits.test_labels)
    cat_model.remove()
    assert row.layers_top1 == pytest.approx(top)
    assert row.layers_delta == pytest.approx(top - row.lq_top1)


def test_predictions_recompute_the_row(measurement, digits):
    predictions, row = measurement.predictions, measurement.row
    assert torch.equal(predictions["labels"].long(), digits.test_labels)
    for name in ("fp", "lq", "plain_affine", "cat_paper", "output", "layers"):
        assert top1(predictions[name], predictions["labels"]) == getattr(row, f"{name}_top1")
    distinct = {tuple(classes.tolist()) for classes in predictions.values()}
    assert len(distinct) == len(predictions), "equal predictions would hide a mix-up"
    measurement.verify("this")


def test_row_says_what_was_measured(row):
    found = (row.dataset, row.model, row.method, row.w_bits, row.a_bits, row.seed)
    assert found == ("digits", "resnet8", "rtn", 2, 4, 3)
    assert (row.iters, row.n_calib, row.n_cat, row.n_eval) == (1, 64, 256, 500)


def test_paper_mode_needs_as_many_images_as_clusters(digits, model):
    few, enough = (Protocol(iters=1, n_calib=64, n_cat=n_cat) for n_cat in (63, 64))
    rows = [measure(SETTING, images, digits, "resnet8", model, OF_LOGITS).row for images in (few, enough)]
    assert [row.cat_paper_top1 is None for row in rows] == [True, False]
    assert [row.layers_top1 for row in rows] == [None, None]


def test_each_correction_is_fitted_on_the_images_meant_for_it(digits, model, parts, monkeypatch):
    """Neither quantization nor a fit may see a test image, nor a fit an image that quantization was tuned on."""
    seen, real_quantize, real_fit = {}, network_logits.timed_quantized_model, leak_guard.fit_cluster_affine

    def spy_quantize(fp_model, images, *args, **options):
        seen["calib"] = images
        return real_quantize(fp_model, images, *args, **options)

    def spy_fit(q, f, config):
        seen.setdefault("fits", {})[config] = f
        return real_fit(q, f, config)

    def spy_apply(quantized, fp_model, images, config, augment, progress):
        assert augment is None
        seen["layers"] = images, config
        return CATWrapper(quantized, fit_cluster_affine(*[fp_model(images[:9])] * 2))

    monkeypatch.setattr(network_logits, "timed_quantized_model", spy_quantize)
    monkeypatch.setattr(leak_guard, "fit_cluster_affine", spy_fit)
    monkeypatch.setattr(leak_guard, "apply_cat", spy_apply)
    measure(SETTING, PROTOCOL, digits, "resnet8", model, progress=False)
    calib, cat = parts
    images, config = seen["layers"]
    assert torch.equal(images, digits.train_images[cat]) and config == CATConfig(seed=3)
    assert torch.equal(seen["calib"], digits.train_images[calib])
    plain_affine = CATConfig.paper(num_clusters=1, alpha=1.0, seed=3)
    assert set(seen["fits"]) == {plain_affine, CATConfig.paper(seed=3), CATConfig(layers="none", seed=3)}
    with torch.no_grad():
        fresh = model(digits.train_images[cat])
    for f in seen["fits"].values():
        torch.testing.assert_close(f, fresh)


def test_measurement_is_timed(measurement):
    assert 0 < measurement.seconds < time.perf_counter() - STARTED
    assert list(measurement.parts) == ["quantization", "plain_affine", "cat_paper", "output", "layers"]
    assert all(seconds > 0 for seconds in measurement.parts.values())
    assert measurement.parts["layers"] > measurement.parts["output"] > measurement.parts["plain_affine"]


def test_stored_row_comes_back(measurement, tmp_path):
    measurement.store(tmp_path / "row.json")
    found = Measurement.load(tmp_path / "row.json")
    assert same(found, measurement)
    assert (found.seconds, found.parts, found.profiles) == (
        measurement.seconds,
        measurement.parts,
        measurement.profiles,
    )


def test_row_of_a_version_without_layers_is_one_of_the_output(tmp_path):
    """As it was stored when the correction of the output was all of CAT."""
    expected = make_measurement(layers=False)
    expected.store(tmp_path / "row.json")
    values = json.loads((tmp_path / "row.json").read_text())
    values["cat_top1"], values["cat_delta"] = values.pop("output_top1"), values.pop("output_delta")
    del values["layers_top1"], values["layers_delta"]
    (tmp_path / "row.json").write_text(json.dumps(values))
    stored = load_file(tmp_path / "row.safetensors")
    stored["cat"] = stored.pop("output")
    save_file(stored, tmp_path / "row.safetensors")
    found = Measurement.load(tmp_path / "row.json")
    assert same(found, expected) and found.parts == {}
    found.verify("row")


def test_top1_is_a_percentage():
    assert top1(torch.arange(3), torch.tensor([0, 1, 0])) == pytest.approx(66.6667)
    assert top1(torch.arange(3), torch.arange(3)) == 100
