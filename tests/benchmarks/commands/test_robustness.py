"""The command line, end to end on tiny files of logits and a tiny network."""

import csv
import json

import numpy as np
import pytest

from benchmarks.commands.robustness import main
from benchmarks.measure import leak_guard, network_logits
from tests.benchmarks.logits import write_npz
from tests.reference import lstsq_per_cluster

SKIP = 10


@pytest.fixture
def arrays(tmp_path):
    """Of the files a and b: 200 and 140 rows to draw from."""
    return {name: write_npz(tmp_path / "in" / f"{name}.npz", rows, rows) for name, rows in (("a", 210), ("b", 150))}


@pytest.fixture
def options(arrays, tmp_path):
    return [
        *("--logits", str(tmp_path / "in"), "--skip", str(SKIP), "--images", "64", "32", "64", "--max-draws", "2"),
        *("--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"), "--no-progress"),
    ]


@pytest.fixture
def networks(shared_folder, weights, tmp_path):
    """A ResNet-20 quantized twice; 60 training images, of which 16 are for quantization."""
    return [
        *("--dataset", "cifar10", "--data", str(shared_folder), "--weights", str(weights)),
        *("--methods", "rtn", "--bits", "2/4", "4/4", "--iters", "2", "--n-calib", "16", "--batch-size", "8"),
        *(
            "--images",
            "16",
            "--results",
            str(tmp_path / "results"),
            "--cache",
            str(tmp_path / "cache"),
            "--no-progress",
        ),
    ]


@pytest.fixture
def fits(monkeypatch):
    """The logits `(q, f)` of every fit."""
    seen, real = [], leak_guard.fit_cluster_affine

    def spy(q, f, *args):
        seen.append((q.clone(), f.clone()))
        return real(q, f, *args)

    monkeypatch.setattr(leak_guard, "fit_cluster_affine", spy)
    return seen


def folder(tmp_path, name="results"):
    (found,) = (tmp_path / name).iterdir()
    return found


def table(path):
    """Rows of the CSV file."""
    return list(csv.DictReader(path.open()))


def test_every_draw_of_every_file_is_a_row(options, arrays, tmp_path, capsys):
    assert main(options) == 0
    rows = table(folder(tmp_path) / "results.csv")
    grid = [(source, n, draw) for source in "ab" for n in (32, 64) for draw in (0, 1)]
    modes = {32: ["plain_affine", "output"], 64: ["plain_affine", "cat_paper", "output"]}
    assert [(row["source"], int(row["images"]), int(row["draw"]), row["mode"]) for row in rows] == [
        (*cell, mode) for cell in grid for mode in modes[cell[1]]
    ]
    for row in rows:
        if row["mode"] != "plain_affine":
            continue
        held, start = arrays[row["source"]], SKIP + int(row["draw"]) * int(row["images"])
        q, f = (held[name][start : start + int(row["images"])].astype(float) for name in ("q_calib", "f_calib"))
        slope, offset = lstsq_per_cluster(q, f, np.zeros(len(q), int), 1)
        before = held["q_test"].argmax(1) == held["y_test"]
        after = (slope * held["q_test"] + offset).argmax(1) == held["y_test"]
        assert float(row["lq_top1"]) == pytest.approx(100 * before.mean(), abs=1e-3)
        assert float(row["gain"]) == pytest.approx(100 * (after.mean() - before.mean()), abs=1e-3)
    assert (folder(tmp_path) / "results.md").read_text().strip() in capsys.readouterr().out
    assert folder(tmp_path).name.startswith("robustness-in-")
    found = json.loads((folder(tmp_path) / "environment.json").read_text())
    assert found["command"].startswith("python -m benchmarks robustness --logits")


def test_fits_see_neither_test_images_nor_skipped_rows_nor_images_of_another_draw(options, arrays, fits):
    assert main([*options, "--images", "64"]) == 0
    fresh = {name: {row.tobytes(): i for i, row in enumerate(held["q_calib"])} for name, held in arrays.items()}
    seen = {name: [] for name in arrays}
    for q, f in fits:
        (name,) = (name for name in arrays if q.numpy()[0].tobytes() in fresh[name])
        rows = [fresh[name][row.tobytes()] for row in q.numpy()]
        assert np.array_equal(arrays[name]["f_calib"][rows], f.numpy())
        seen[name].append(rows)
    blocks = [list(range(SKIP, SKIP + 64)), list(range(SKIP + 64, SKIP + 128))]
    assert seen == {name: [block for block in blocks for _ in range(3)] for name in arrays}


def test_stopped_run_resumes_with_the_same_table(options, tmp_path, monkeypatch, capsys):
    whole = ["--results", str(tmp_path / "whole"), "--cache", str(tmp_path / "other")]
    assert main([*options, *whole]) == 0
    calls, real = [], leak_guard.fit_cluster_affine

    def killed_at_sixth(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(leak_guard, "fit_cluster_affine", killed_at_sixth)
    assert main(options) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert not (folder(tmp_path) / "results.csv").exists()
    assert main(options) == 0
    assert "5 of 20 rows are finished already" in capsys.readouterr().out
    assert len(calls) == 21
    assert table(folder(tmp_path) / "results.csv") == table(folder(tmp_path, "whole") / "results.csv")
    assert (folder(tmp_path) / "results.md").read_text() == (folder(tmp_path, "whole") / "results.md").read_text()


def test_rows_are_shared_by_runs_of_other_sizes_until_the_logits_change(options, tmp_path, fits):
    assert main([*options, "--images", "64"]) == 0
    assert len(fits) == 12
    assert main(options) == 0
    assert len(fits) == 12 + 8
    write_npz(tmp_path / "in" / "b.npz", 150, seed=9)
    assert main(options) == 0
    assert len(fits) == 12 + 8 + 10
    assert main([*options, "--fresh"]) == 0
    assert len(fits) == 12 + 8 + 10 + 20
    assert len(list((tmp_path / "results").iterdir())) == 3


def test_networks_are_sources_beside_files_and_run_once(networks, arrays, tmp_path, monkeypatch, capsys, fits):
    files = ["--logits", str(tmp_path / "in"), "--skip", str(SKIP)]
    assert main(networks) == 0
    assert "44 fresh images are 2 of 16." in capsys.readouterr().out
    names = ["cifar10-resnet20-rtn-w2a4-seed0", "cifar10-resnet20-rtn-w4a4-seed0"]
    rows = table(folder(tmp_path) / "results.csv")
    assert [row["source"] for row in rows] == [name for name in names for _ in range(4)]
    assert all(row["n_eval"] == "20" for row in rows) and len(fits) == 8

    def run_again(*args, **options):
        raise AssertionError("networks were run again")

    monkeypatch.setattr(network_logits, "paired_logits", run_again)
    assert main([*networks, *files, "--run", "both"]) == 0
    rows = table(tmp_path / "results" / "both" / "results.csv")
    assert list(dict.fromkeys(row["source"] for row in rows)) == ["a", "b", *names]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "201"], "not one draw of 201 images fits; Fewer than 2 draws of a size in b: 140 fresh images"),
        (["--skip", "150"], "b.npz: none of 150 rows is left after --skip 150"),
        (["--logits", "nowhere"], "nowhere holds no *.npz files"),
        (["--weights", "a.pt"], "--weights is for networks, which beside --logits are asked for by --dataset"),
        (["--n-calib", "64"], "--n-calib is for networks"),
        (["--run", "../up"], "must be a plain folder name"),
    ],
)
def test_wrong_input_ends_with_one_line_and_code_2(options, more, message, capsys):
    assert main([*options, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_two_sources_of_one_name_are_refused(options, tmp_path, capsys):
    write_npz(tmp_path / "more" / "a.npz", 100)
    assert main([*options, "--logits", str(tmp_path / "in"), str(tmp_path / "more")]) == 2
    assert "more than one source is called a; rename the files" in capsys.readouterr().err


def test_training_images_must_be_left_to_draw(networks, capsys):
    assert main([*networks, "--n-calib", "60"]) == 2
    assert "--n-calib 60 leaves none of the 60 training images to draw" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "0"], "'0' should be a whole number of at least 1"),
        (["--skip", "-1"], "'-1' should be a whole number of at least 0"),
        (["--max-draws", "none"], "'none' should be a whole number of at least 1"),
    ],
)
def test_wrong_options_end_with_code_2(more, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(more)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
