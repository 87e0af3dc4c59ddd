"""The command line, end to end on a tiny CIFAR-10."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.commands import compare
from benchmarks.networks import quantized
from benchmarks.networks.models import MODELS
from benchmarks.networks.training import RECIPES
from benchmarks.networks.weights_and_transforms import untrained
from tests.benchmarks.rows import make_measurement

TABLES = ["comparisons.csv", "results.csv", "results.json", "results.md", "summary.csv"]
FIGURES = ["classes.png", "gains.png"]  # logits.png only where a correction changes them
COSTS = ["costs.csv", "costs.md"]
ALL_FILES = sorted([*TABLES, *FIGURES, *COSTS, "environment.json", "rows", "settings.json"])


def results(tmp_path, name="results"):
    (folder,) = (tmp_path / name).iterdir()
    return folder


def test_run_on_a_folder_writes_and_prints_its_table(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert compare.main([*tiny, "--seeds", "3"]) == 0
    folder = results(tmp_path)
    assert sorted(path.name for path in folder.iterdir() if path.name != "logits.png") == ALL_FILES
    (line,) = csv.DictReader((folder / "results.csv").open())
    assert line["cat_paper_top1"] == ""
    for mode in ("output", "layers"):
        assert float(line[f"{mode}_delta"]) == pytest.approx(float(line[f"{mode}_top1"]) - float(line["lq_top1"]))
    printed = capsys.readouterr()
    for name in ("results.md", "costs.md"):
        assert (folder / name).read_text().strip() in printed.out
    assert "weights" not in printed.out, "CIFAR-10 has none that are published, to be told from others"
    assert not printed.err
    assert "no result" not in printed.out


def test_demo_says_in_its_last_line_that_it_is_no_result(tmp_path, capsys):
    torch.save(untrained("resnet8", 10).state_dict(), tmp_path / "net.pt")
    options = ["--weights", str(tmp_path / "net.pt"), "--methods", "rtn", "--bits", "4/4", "--modes", "plain_affine"]
    few = ["--n-calib", "16", "--n-cat", "40", "--results", str(tmp_path / "results"), "--no-progress"]
    assert compare.main(["--dataset", "digits", *options, *few]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "no result: digits, which come with scikit-learn, are too easy" in last


def test_zip_mobilenet_and_qdrop(tiny, cifar_zip, tmp_path):
    torch.save(untrained("mobilenetv2", 10).state_dict(), tmp_path / "mobile.pt")
    options = ["--data", str(cifar_zip), "--model", "mobilenetv2", "--weights", str(tmp_path / "mobile.pt")]
    assert compare.main([*tiny, *options, "--methods", "qdrop", "--bits", "2/4"]) == 0
    assert "mobilenetv2,qdrop,2,4,0,2,16,40,20" in (results(tmp_path) / "results.csv").read_text()


def test_resumed_run_ends_with_the_same_table(tiny, tmp_path, monkeypatch, capsys):
    options, real, calls = [*tiny, "--bits", "2/2", "4/4", "--seeds", "0", "1"], compare.measure, []

    def killed_at_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    assert compare.main([*options, "--results", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(compare, "measure", killed_at_third)
    assert compare.main(options) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert not (results(tmp_path) / "results.csv").exists()
    assert compare.main(options) == 0
    assert "2 of 4 rows are finished already" in capsys.readouterr().out
    assert len(calls) == 5
    for name in TABLES:
        assert (results(tmp_path) / name).read_text() == (results(tmp_path, "whole") / name).read_text()


@pytest.fixture
def free(tiny, monkeypatch):
    """The tiny run with rows that cost nothing."""
    monkeypatch.setattr(compare, "measure", lambda setting, *args, **kwargs: make_measurement(setting))
    return tiny


def test_environment_is_that_of_the_run_that_measured(free, tmp_path):
    assert compare.main([*free, "--seeds", "4", "5"]) == 0
    text = (results(tmp_path) / "environment.json").read_text()
    found = json.loads(text)
    assert found["command"].startswith("python -m benchmarks compare --dataset cifar10")
    assert found["seeds"] == [4, 5]
    assert found["protocol"]["n_cat"] == 40
    assert found["versions"]["torch"] == torch.__version__
    assert {"platform", "cpu_count", "threads", "git_commit", "seconds"} <= found.keys()
    assert compare.main([*free, "--seeds", "4", "5"]) == 0
    assert (results(tmp_path) / "environment.json").read_text() == text


def test_run_killed_before_its_environment_was_written_gets_one(free, tmp_path, monkeypatch):
    seconds = iter([1.0, 2.0, 4.0])

    def work(setting, *args, **kwargs):
        return replace(make_measurement(setting), seconds=next(seconds))

    def killed(*args):
        raise KeyboardInterrupt

    def environment():
        return json.loads((results(tmp_path) / "environment.json").read_text())

    options = [*free, "--seeds", "4", "5"]
    monkeypatch.setattr(compare, "measure", work)
    with monkeypatch.context() as patch:
        patch.setattr(compare, "write_report", killed)
        assert compare.main(options) == 130
    assert not (results(tmp_path) / "environment.json").exists()
    assert compare.main(options) == 0
    first = environment()
    assert (first["seconds"], first["seeds"]) == (3.0, [4, 5])
    next((results(tmp_path) / "rows").glob("*seed4.json")).unlink()
    assert compare.main([*options, "--no-progress"]) == 0
    assert environment() == {**first, "seconds": 6.0}


def test_network_that_cannot_be_quantized_ends_with_one_line_and_code_2(tiny, monkeypatch, capsys):
    def diverge(*args, **options):
        raise FloatingPointError("the reconstruction loss of fc is nan at step 1")

    monkeypatch.setattr(quantized, "quantize", diverge)
    assert compare.main(tiny) == 2
    message = "the network cannot be quantized by rtn W4A4: the reconstruction loss of fc is nan at step 1"
    assert capsys.readouterr().err == f"error: {message}\n"


def test_every_setting_of_the_grid_is_a_row(free, tmp_path):
    options = ["--methods", "rtn", "qdrop", "rtn", "--bits", "2/2", "4/2", "--seeds", "0", "1"]
    assert compare.main([*free, *options]) == 0
    lines = list(csv.DictReader((results(tmp_path) / "results.csv").open()))
    grid = [(line["method"], line["w_bits"] + line["a_bits"], line["seed"]) for line in lines]
    assert grid == [(method, bits, seed) for method in ("rtn", "qdrop") for bits in ("22", "42") for seed in "01"]


def test_named_run_of_other_settings_is_refused(free, tmp_path, capsys):
    assert compare.main([*free, "--run", "mine"]) == 0
    assert compare.main([*free, "--run", "mine", "--n-cat", "39"]) == 2
    assert "protocol: " in capsys.readouterr().err
    assert compare.main([*free, "--run", "mine", "--n-cat", "39", "--fresh"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n-cat", "45"], "n_calib=16 plus n_cat=45 needs 61 training images, there are 60"),
        (["--n-calib", "7"], "--n-calib 7 is less than one batch"),
        (["--data", "nowhere"], "no such file or folder: nowhere"),
        (["--weights", "nowhere.pt"], "no such weights file: nowhere.pt"),
        (["--model", "mobilenetv2"], "does not fit the MobileNetV2; missing: features"),
        (["--model", "resnet8"], "--model resnet8 is not for cifar10; choose from resnet20, mobilenetv2, vit"),
        (["--run", "../up"], "must be a plain folder name"),
    ],
)
def test_wrong_input_ends_with_one_line_and_code_2(tiny, options, message, capsys):
    assert compare.main([*tiny, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_weights_are_needed_for_cifar10(capsys):
    assert compare.main(["--dataset", "cifar10"]) == 2
    assert "--dataset cifar10 needs --weights FILE, a state_dict of resnet20" in capsys.readouterr().err


def test_transformer_is_trained_where_no_weights_are_given(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "vit", replace(RECIPES["vit"], epochs=1, batch_size=20))
    at = tiny.index("--weights")
    options = [*tiny[:at], *tiny[at + 2 :], "--model", "vit", "--cache", str(tmp_path / "cache")]
    assert compare.main([*options, "--bits", "8/8", "--seeds", "0", "--modes", "output"]) == 0
    (found,) = (tmp_path / "cache").glob("cifar10-vit-*.safetensors")
    assert load_file(found).keys() == MODELS["vit"](10).state_dict().keys()


def test_data_is_not_for_digits(tmp_path, capsys):
    assert compare.main(["--data", str(tmp_path)]) == 2
    assert "did you mean --dataset cifar10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "2"], "'2' should be WEIGHT_BITS/ACTIVATION_BITS such as 2/4"),
        (["--bits", "1/4"], "bits should be 2 to 8, or 32"),
        (["--iters", "0"], "'0' should be a whole number of at least 1"),
        (["--seeds", "-1"], "'-1' should be a whole number from 0 to 4294967295"),
        (["--seeds", "4294967296"], "should be a whole number from 0 to 4294967295"),
        (["--methods", "magic"], "invalid choice: 'magic'"),
        (["--device", "nothing"], "'nothing' cannot be used here"),
        (["--device", "meta"], "'meta' cannot be used here"),
    ],
)
def test_wrong_options_end_with_code_2(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
