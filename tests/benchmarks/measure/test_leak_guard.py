"""Leaks of test images, planted wherever something is quantized, trained, fitted or drawn, are found."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks
from benchmarks import BenchmarkError
from benchmarks.commands import ablate, compare, robustness
from benchmarks.datasets.calibration_split import split_calibration
from benchmarks.datasets.digits import DIGITS
from benchmarks.datasets.registry import DATASETS
from benchmarks.measure.corrections import corrections
from benchmarks.measure.draws import Cell, measure
from benchmarks.measure.leak_guard import (
    LeakGuard,
    fit_guarded,
    fit_networks_guarded,
    fit_positions_guarded,
    joined,
    position_rows,
)
from benchmarks.measure.network_logits import paired_logits
from benchmarks.measure.paired_logits import PairedLogits, Source
from benchmarks.measure.protocol import Protocol, Setting
from benchmarks.networks.weights_and_transforms import untrained
from cat_plugin import CATConfig, fit_cluster_affine
from tests.benchmarks.logits import make_arrays, write_npz

SETTING = Setting("rtn", 4, 4, seed=1)
PROTOCOL = Protocol(iters=1, n_calib=8, n_cat=16, batch_size=8)
PLAIN = CATConfig.paper(num_clusters=1)


@pytest.fixture
def pairs():
    arrays = {name: torch.from_numpy(values) for name, values in make_arrays(100).items()}
    return PairedLogits(
        fit_q=arrays["q_calib"],
        fit_f=arrays["f_calib"],
        tuned_q=arrays["q_calib"][:40].flip(1),
        tuned_f=arrays["f_calib"][:40].flip(1),
        test_q=arrays["q_test"],
        test_f=arrays["f_test"],
        labels=arrays["y_test"],
    )


def planted(dataset, place):
    """The data set with test image 7 as training image `place`."""
    images = dataset.train_images.clone()
    images[place] = dataset.test_images[7]
    return replace(dataset, train_images=images)


def test_message_says_which_images_and_what_to_do():
    guard = LeakGuard(torch.arange(12.0).view(3, 2, 2))
    guard.check(torch.arange(1.0, 13).view(3, 2, 2), "images")
    leaked = torch.stack([torch.full((2, 2), 0.5), torch.arange(8.0, 12).view(2, 2), torch.arange(4.0).view(2, 2)])
    with pytest.raises(BenchmarkError) as error:
        guard.check(leaked, "images for this")
    assert str(error.value).startswith(
        "leak: 2 of 3 images for this are test images, such as number 1, which is test image 2;"
    )


@pytest.mark.parametrize(("part", "role"), [(0, "8 images for quantization"), (1, "16 images for corrections")])
def test_test_image_among_the_images_of_a_part_stops_the_run(dataset, part, role):
    place = split_calibration(40, 8, 16, seed=1)[part][5]
    with pytest.raises(BenchmarkError, match=f"leak: 1 of {role} are test images, such as number 5, which is test"):
        paired_logits(SETTING, PROTOCOL, planted(dataset, place), untrained("resnet8", 10))


def test_training_images_that_are_not_used_may_be_anything(dataset):
    used = torch.cat(split_calibration(40, 8, 16, seed=1)).tolist()
    place = next(index for index in range(40) if index not in used)
    paired_logits(SETTING, PROTOCOL, planted(dataset, place), untrained("resnet8", 10))


def test_network_is_not_trained_on_test_images(dataset, monkeypatch, capsys, tmp_path):
    leaking = replace(DIGITS, load=lambda request: planted(dataset, 3))
    monkeypatch.setitem(DATASETS, DIGITS.name, leaking)
    assert compare.main(["--cache", str(tmp_path), "--results", str(tmp_path), "--no-progress"]) == 2
    assert "leak: 1 of 40 images to train on are test images, such as number 3" in capsys.readouterr().err


def test_fit_that_is_handed_test_logits_is_refused(pairs):
    guard = LeakGuard(joined(pairs.test_q, pairs.test_f))
    with pytest.raises(BenchmarkError, match="leak: 300 of 300 images that a correction is to be fitted on"):
        fit_guarded(pairs.test_q, pairs.test_f, PLAIN, guard)
    with pytest.raises(BenchmarkError, match="leak: 1 of 51 images"):
        rows = [*range(20, 70), 99]
        q, f = pairs.fit_q[rows], pairs.fit_f[rows]
        q[-1], f[-1] = pairs.test_q[11], pairs.test_f[11]
        fit_guarded(q, f, PLAIN, guard)
    found = fit_guarded(pairs.fit_q, pairs.fit_f, PLAIN, guard)
    expected = fit_cluster_affine(pairs.fit_q, pairs.fit_f, PLAIN)
    assert torch.equal(found.scale, expected.scale) and torch.equal(found.shift, expected.shift)


@pytest.mark.parametrize("positions", [1, 5])
def test_fit_that_is_handed_a_position_of_a_test_image_is_refused(pairs, positions):
    test = [logits.view(-1, positions, 5) for logits in (pairs.test_q, pairs.test_f)]
    q, f = (logits.view(-1, positions, 5).clone() for logits in (pairs.fit_q, pairs.fit_f))
    found = fit_positions_guarded(q, f, PLAIN, LeakGuard(position_rows(*test)))
    expected = fit_cluster_affine(pairs.fit_q, pairs.fit_f, PLAIN)
    assert torch.equal(found.correction.shift, expected.shift)
    assert (found.images, found.positions) == (100 // positions, 100 if positions > 1 else None)
    for logits, planted in zip((q, f), test, strict=True):
        logits[3, -1] = planted[7, 0]
    with pytest.raises(BenchmarkError, match="leak: 1 of 100 positions of images that a correction is to be fitted on"):
        fit_positions_guarded(q, f, PLAIN, LeakGuard(position_rows(*test)))


def test_fit_of_networks_that_is_handed_a_test_image_is_refused(dataset):
    leaking = planted(dataset, 3)
    network = untrained("resnet8", 10)
    with pytest.raises(BenchmarkError, match="leak: 1 of 5 images that a correction is to be fitted on are test"):
        guard = LeakGuard(leaking.test_images)
        fit_networks_guarded(network, network, leaking.train_images[:5], CATConfig(), guard)
    assert not any(layer._forward_hooks for layer in network.modules())


@pytest.mark.parametrize("origin", ["fresh", "tuned"])
def test_every_fit_of_a_grid_is_guarded(pairs, origin):
    part = "fit" if origin == "fresh" else "tuned"
    leaked = {f"{part}_{name}": getattr(pairs, f"{part}_{name}").clone() for name in "qf"}
    for name in "qf":
        leaked[f"{part}_{name}"][25] = getattr(pairs, f"test_{name}")[2]
    source = Source(name="a", digest="", fresh=100, tuned=40, load=None)
    cells = [Cell(source, 20, draw, "plain_affine", corrections(20, 0)["plain_affine"], origin) for draw in range(2)]
    measure(cells[0], replace(pairs, **leaked))
    with pytest.raises(BenchmarkError, match=r"leak: 1 of 20 images .* such as number 5, which is test image 2"):
        measure(cells[1], replace(pairs, **leaked))


@pytest.mark.parametrize("command", [robustness, ablate])
@pytest.mark.parametrize(("row", "role"), [(30, "images to fit on"), (3, "images that quantization was tuned on")])
def test_file_of_logits_with_a_test_image_is_refused(tmp_path, capsys, command, row, role):
    arrays = write_npz(tmp_path / "in" / "a.npz", 100)
    for name in "qf":
        arrays[f"{name}_calib"][row] = arrays[f"{name}_test"][5]
    np.savez(tmp_path / "in" / "a.npz", **arrays)
    options = ["--logits", str(tmp_path / "in"), "--skip", "10", "--results", str(tmp_path / "out")]
    assert command.main([*options, "--cache", str(tmp_path / "cache"), "--no-progress"]) == 2
    assert f"{role} are test images" in capsys.readouterr().err


def test_test_images_and_labels_change_no_fit(dataset, monkeypatch):
    """Whatever is scored on, the corrections are the same, bit for bit."""
    fitted, real = [], PairedLogits.fit
    monkeypatch.setattr(PairedLogits, "fit", lambda *args: (fitted.append(real(*args)), fitted[-1])[1])
    other = replace(dataset, test_images=dataset.test_images.flip(0) + 1, test_labels=(dataset.test_labels + 3) % 10)
    from benchmarks.measure.accuracy import measure as measure_row

    for data in (dataset, other):
        measure_row(SETTING, PROTOCOL, data, "resnet8", untrained("resnet8", 10, seed=1), progress=False)
    first, second = fitted[: len(fitted) // 2], fitted[len(fitted) // 2 :]
    assert len(first) == 2
    for one, two in zip(first, second, strict=True):
        assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_nothing_is_fitted_past_the_guard():
    """`leak_guard.py` alone may name what fits corrections; `perf` times fits of random logits."""
    fitting = {"fit_cluster_affine", "apply_cat", "fit_and_score", "fit_layers", "fit_both_levels", "select"}
    root = Path(benchmarks.__file__).parent
    for path in {*root.rglob("*.py")} - {*(root / "perf").rglob("*.py")}:
        tree = ast.parse(path.read_text("utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert path.name == "leak_guard.py" or not names & fitting, path.name
    guarded = (root / "measure" / "leak_guard.py").read_text("utf-8")
    assert all(name in guarded for name in ("fit_cluster_affine", "fit_and_score", "apply_cat"))
