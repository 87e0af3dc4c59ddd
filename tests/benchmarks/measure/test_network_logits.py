from dataclasses import replace

import pytest
import torch

from baselines import quantize
from benchmarks.datasets.calibration_split import split_calibration
from benchmarks.measure import network_logits
from benchmarks.measure.network_logits import Networks, network_sources
from benchmarks.measure.protocol import Protocol, Setting
from benchmarks.networks.weights_and_transforms import untrained
from cat_plugin import CATConfig, apply_cat, fit_cluster_affine

PROTOCOL = Protocol(iters=2, n_calib=16, n_cat=24, batch_size=8)
GRID = [Setting("rtn", 4, 4, 0), Setting("rtn", 2, 4, 1)]


@pytest.fixture(scope="module")
def model():
    return untrained("resnet8", 10, seed=1)


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


@pytest.mark.parametrize("kind", [CATConfig(), CATConfig(layers="none")], ids=["layers", "output"])
def test_correction_gives_the_logits_of_the_corrected_network_and_leaves_it_as_it_was(dataset, model, kind):
    networks = Networks.made(GRID[1], PROTOCOL, dataset, model)
    with torch.no_grad():
        plain = networks.quantized(dataset.test_images)
    state = {name: tensor.clone() for name, tensor in networks.quantized.state_dict().items()}
    found = networks.correct(kind)
    cat_model = apply_cat(networks.quantized, model, networks.fit_images, config=kind)
    with torch.no_grad():
        torch.testing.assert_close(found.logits, cat_model(dataset.test_images))
    cat_model.remove()
    assert found.seconds >= networks.collect_seconds * (kind.layers == "none")
    with torch.no_grad():
        assert torch.equal(networks.quantized(dataset.test_images), plain)
    assert all(torch.equal(tensor, state[name]) for name, tensor in networks.quantized.state_dict().items())
    assert not any(layer._forward_hooks for layer in networks.quantized.modules())


@pytest.fixture
def runs(monkeypatch):
    """The settings whose networks were really run."""
    settings, real = [], network_logits.paired_logits

    def spy(setting, *args, **options):
        settings.append(setting)
        return real(setting, *args, **options)

    monkeypatch.setattr(network_logits, "paired_logits", spy)
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
        model = untrained("resnet8", 10, seed=2)
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


def test_folds_are_fitted_on_one_half_and_scored_on_the_other(dataset, model):
    folded = replace(dataset, test_folds=2)
    networks = Networks.made(GRID[1], replace(PROTOCOL, n_cat=10), folded, model)
    assert len(networks.fit_images) == 0
    seen = []
    for fold, (fit_rows, test_rows) in zip(networks.folds(10), folded.folds(), strict=True):
        found = fold.correct(CATConfig(layers="none"))
        fitted_on = dataset.test_images[fit_rows]
        assert sorted(fold.fit_rows.tolist()) == fit_rows.tolist() and len(fold.fit_images) == 10
        with torch.no_grad():
            q, f = networks.quantized(fold.fit_images), model(fold.fit_images)
            test_q = networks.quantized(dataset.test_images[test_rows])
        assert {image.sum().item() for image in fold.fit_images} == {image.sum().item() for image in fitted_on}
        torch.testing.assert_close(fold.logits.fit_q, q)
        torch.testing.assert_close(found.logits, fit_cluster_affine(q, f, CATConfig(layers="none"))(test_q))
        assert torch.equal(fold.logits.labels, dataset.test_labels[test_rows])
        layered = fold.correct(CATConfig())
        cat_model = apply_cat(networks.quantized, model, fold.fit_images, config=CATConfig())
        with torch.no_grad():
            torch.testing.assert_close(layered.logits, cat_model(dataset.test_images[test_rows]))
        cat_model.remove()
        seen += test_rows.tolist()
    assert sorted(seen) == list(range(20))


def test_images_that_quantization_had_too_are_counted(dataset, model):
    few = replace(PROTOCOL, n_calib=6, n_cat=8)
    assert Networks.made(GRID[0], few, dataset, model).reused_images == 0
    same_place = replace(dataset, cat_images=dataset.train_images[:8])
    networks = Networks.made(GRID[0], replace(few, n_calib=len(dataset.train_images)), same_place, model)
    assert networks.reused_images == 8
