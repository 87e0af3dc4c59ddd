"""The command line, end to end on tiny files of logits and a tiny network."""

import csv

import pytest
import torch

from benchmarks.anchors import load_anchors
from benchmarks.commands import ablate, robustness
from benchmarks.measure import leak_guard
from cat_plugin import CATConfig, fit_cluster_affine
from tests.benchmarks.logits import write_npz

SKIP = 70


@pytest.fixture
def arrays(tmp_path):
    return write_npz(tmp_path / "in" / "a.npz", 300)


@pytest.fixture
def options(arrays, tmp_path):
    return [
        *("--logits", str(tmp_path / "in"), "--skip", str(SKIP), "--n-cat", "100", "--max-draws", "2"),
        *("--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"), "--no-progress"),
    ]


@pytest.fixture
def fits(monkeypatch):
    """The logits of the low-bit network of every fit."""
    seen, real = [], leak_guard.fit_cluster_affine

    def spy(q, f, config):
        seen.append(q)
        return real(q, f, config)

    monkeypatch.setattr(leak_guard, "fit_cluster_affine", spy)
    return seen


def run(options, tmp_path, *factors):
    assert ablate.main([*options, "--run", "mine", "--factors", *factors]) == 0
    return tmp_path / "results" / "mine"


def lines(path):
    return list(csv.DictReader(path.open()))


def test_gain_at_every_value_equals_that_by_hand(options, arrays, tmp_path, capsys):
    folder = run(options, tmp_path, "alpha=0.3,1", "images=64")
    held = {name: torch.from_numpy(values) for name, values in arrays.items()}
    before = held["q_test"].argmax(1) == held["y_test"]
    found = lines(folder / "alpha.csv") + lines(folder / "images.csv")
    assert len(found) == 2 * 2 * 2 + 2 * 2
    for line in found:
        value = float(line["value"])
        images, alpha = (100, value) if line["factor"] == "alpha" else (64, None)
        config = CATConfig.paper() if line["mode"] == "cat_paper" else CATConfig(layers="none")
        if alpha is not None:
            config = CATConfig.from_dict(config.to_dict() | {"alpha": alpha})
        start = SKIP + int(line["draw"]) * images
        q, f = (held[name][start : start + images] for name in ("q_calib", "f_calib"))
        after = fit_cluster_affine(q, f, config)(held["q_test"]).argmax(1) == held["y_test"]
        gain = 100 * (after.double().mean() - before.double().mean()).item()
        assert float(line["gain"]) == pytest.approx(gain, abs=1e-3)
    assert len({line["gain"] for line in found}) > 6, "figures that coincide would hide a mix-up"
    printed = capsys.readouterr().out
    for name in ("alpha.md", "images.md"):
        assert (folder / name).read_text().strip() in printed


def test_images_of_the_quantization_are_those_that_were_skipped(options, arrays, tmp_path, fits):
    run(options, tmp_path, "origin")
    rows = {values.tobytes(): index for index, values in enumerate(arrays["q_calib"])}
    blocks = {tuple(rows[values.tobytes()] for values in q.numpy()) for q in fits}
    assert blocks == {tuple(range(SKIP)), *(tuple(range(SKIP + s, SKIP + s + 70)) for s in (0, 70))}


def test_fits_are_made_once_and_shared_with_other_runs(options, tmp_path, fits):
    run(options, tmp_path, "alpha=0.4,1", "pca-dim=50", "seed=0")
    assert len(fits) == 2 * 4, "two values of alpha in two modes; the other factors are at their centres"
    assert ablate.main([*options, "--run", "more", "--factors", "alpha=0.4,0.7,1"]) == 0
    assert len(fits) == 2 * 4 + 2 * 2, "0.7 in two modes"
    files = [*options[:4], *options[8:]]
    assert robustness.main([*files, "--images", "100", "--max-draws", "2"]) == 0
    assert len(fits) == 2 * 4 + 2 * 2 + 2, "plain affine alone is new"


def test_networks_are_quantized_as_in_a_comparison(shared_folder, weights, tmp_path):
    options = ["--dataset", "cifar10", "--data", str(shared_folder), "--weights", str(weights), "--methods", "rtn"]
    options += ["--bits", "2/4", "--iters", "2", "--n-calib", "16", "--batch-size", "8", "--n-cat", "40"]
    options += ["--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"), "--no-progress"]
    folder = run(options, tmp_path, "alpha=1", "origin")
    assert {line["source"] for line in lines(folder / "alpha.csv")} == {"cifar10-resnet20-rtn-w2a4-seed0"}
    assert [(line["value"], line["images"]) for line in lines(folder / "origin.csv")][-1] == ("tuned", "16")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--n-cat", "231"], "there is nothing to fit; Fewer than 2 draws of a size in a: 230 fresh images"),
        (["--n-calib", "64"], "--n-calib is for networks"),
        (["--skip", "300"], "none of 300 rows is left after --skip 300"),
    ],
)
def test_wrong_input_ends_with_one_line_and_code_2(options, more, message, capsys):
    assert ablate.main([*options, "--factors", "alpha", *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        ("depth", "'depth' should be one of clusters, alpha"),
        ("clusters=few", "'clusters=few': values should be of type int"),
        ("clusters=0", "values should be from 1"),
        ("alpha=1.5", "values should be from 0 to 1"),
        ("alpha=nan", "values should be from 0 to 1"),
        ("origin=new", "values should be among fresh, tuned"),
    ],
)
def test_wrong_factors_end_with_code_2(factor, message, capsys):
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--factors", factor])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_published_figures_are_never_among_ours(options, tmp_path):
    folder = run(options, tmp_path, "alpha=0.4")
    assert len(lines(folder / "alpha.csv")) == 4 and load_anchors("alpha")
