"""What options mean together, for ImageNet."""

import os
from pathlib import Path

import pytest

from benchmarks import BenchmarkError
from benchmarks.commands.parsers import parse_ablate, parse_compare, parse_robustness, parse_speed

IMAGENET = ["--dataset", "imagenet", "--data", "DIR"]
ALL_BITS = [(2, 2), (2, 4), (4, 2), (4, 4)]


def test_preset_is_the_papers_protocol():
    args = parse_compare([*IMAGENET, "--preset", "paper"])
    assert (args.model, args.weights) == ("resnet18", Path("IMAGENET1K_V1"))
    assert (args.methods, args.bits, args.iters) == (["pd_quant"], ALL_BITS, 20_000)
    assert (args.n_calib, args.n_cat, args.batch_size) == (1024, 1024, 32)


def test_options_go_before_the_preset():
    options = ["--methods", "brecq", "--iters", "7", "--n-cat", "99", "--n-calib", "64", "--bits", "3/3"]
    args = parse_compare([*IMAGENET, "--preset", "paper", *options, "--weights", "DEFAULT", "--model", "resnet50"])
    assert (args.methods, args.bits, args.iters, args.n_cat, args.n_calib) == (["brecq"], [(3, 3)], 7, 99, 64)
    assert (args.model, args.weights) == ("resnet50", Path("DEFAULT"))


def test_batches_are_no_larger_than_the_images_that_are_asked_for():
    assert parse_compare([*IMAGENET, "--n-calib", "16"]).batch_size == 16
    assert parse_compare([*IMAGENET, "--n-calib", "64"]).batch_size == 32
    with pytest.raises(BenchmarkError, match="--n-calib 16 is less than one batch; lower --batch-size 17"):
        parse_compare([*IMAGENET, "--n-calib", "16", "--batch-size", "17"])


@pytest.mark.parametrize("model", ["deit_small_patch16_224", "deit_base_distilled_patch16_224"])
def test_timm_has_no_first_version_of_weights(model):
    assert parse_compare([*IMAGENET, "--preset", "paper", "--model", model]).weights == Path("DEFAULT")


def test_without_a_preset_published_steps_and_weights_are_the_default():
    args = parse_compare([*IMAGENET, "--model", "regnet_x_3_2gf"])
    assert (args.iters, args.n_calib, args.n_cat, args.weights) == (20_000, 1024, 1024, Path("DEFAULT"))
    assert list(args.methods) == ["rtn", "qdrop"]
    assert args.workers >= 1 and args.fp_top1 is None


def test_other_data_sets_keep_their_defaults():
    args = parse_compare([])
    assert (args.dataset, args.model, list(args.methods), args.bits) == (
        "digits",
        "resnet8",
        ["rtn", "qdrop"],
        ALL_BITS,
    )
    assert (args.iters, args.n_calib, args.n_cat, args.weights) == (250, 256, 1024, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "imagenet"], "--dataset imagenet needs --data DIR with train/<class>/* and val/<class>/*"),
        (["--preset", "paper"], "--preset paper is for --dataset imagenet, got --dataset digits"),
        (["--workers", "2"], "--workers is for --dataset imagenet"),
        (["--fp-top1", "70"], "--fp-top1 is for --dataset imagenet"),
        ([*IMAGENET, "--model", "resnet20"], "--model resnet20 is not for imagenet; choose from resnet18, resnet50"),
        (["--model", "deit_tiny_patch16_224"], "is not for digits; choose from resnet8"),
        (["--model", "timm/resnet18"], "is not for digits; choose from resnet8"),
        (["--model-fn", "m:f"], "--model-fn is for --dataset imagenet"),
        (["--test-data", "val"], "--test-data is for --dataset imagenet"),
        (["--test-folds", "2"], "--test-folds is for --dataset imagenet"),
        (
            [*IMAGENET, "--model", "resnet18", "--model-fn", "m:f"],
            "--model resnet18 and --model-fn m:f are two networks",
        ),
        ([*IMAGENET, "--test-folds", "2", "--cat-data", "cat"], "--test-folds fits corrections on test images in turn"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(BenchmarkError) as error:
        parse_compare(options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "alexnet"], "or for imagenet timm/NAME or torchvision/NAME; did you mean torchvision/alexnet?"),
        (["--model", "resnet81"], "'resnet81' should be one of resnet8, resnet20"),
        (["--model", "resnet81"], "; did you mean resnet8? ("),
        (["--iterations", "3"], "unrecognized arguments: --iterations 3; did you mean --iters? ("),
        (["--bits", "4-4"], "'4-4' should be WEIGHT_BITS/ACTIVATION_BITS"),
        (["--fp-top1", "101"], "'101' should be a number from 0 to 100"),
        (["--fp-top1", "high"], "'high' should be a number from 0 to 100"),
        (["--fp-top1", "nan"], "'nan' should be a number from 0 to 100"),
        (["--workers", "-1"], "'-1' should be a whole number of at least 0"),
        (["--preset", "mine"], "invalid choice: 'mine'"),
    ],
)
def test_wrong_values_end_with_code_2(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_compare([*IMAGENET, *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert error.endswith(" (python -m benchmarks compare --help lists all options)\n")


@pytest.mark.parametrize("options", [["--n-cat", "63"], ["--n-cat", "1"]])
def test_modes_that_cannot_be_fitted_are_refused_before_anything_is_quantized(options):
    with pytest.raises(BenchmarkError, match=r"--n-cat \d+ is too few for --modes cat_paper, which has 64 clusters"):
        parse_compare(["--modes", "cat_paper", *options])
    assert parse_compare(["--modes", "cat_paper", "layers", *options]).modes == ["cat_paper", "layers"]
    assert parse_compare(["--modes", "cat_paper", "--n-cat", "64"]).n_cat == 64


@pytest.mark.parametrize(("processors", "expected"), [(64, 8), (12, 3), (2, 1)])
def test_processes_of_one_machine_share_its_processors(monkeypatch, processors, expected):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    assert parse_compare(IMAGENET).workers == expected
    assert parse_compare([*IMAGENET, "--workers", "7"]).workers == 7


def test_other_commands_take_imagenet_too():
    args = parse_ablate([*IMAGENET, "--model", "mobilenet_v2"])
    assert (args.iters, args.weights) == (20_000, Path("DEFAULT"))
    assert parse_robustness([*IMAGENET, "--workers", "3"]).workers == 3
    assert parse_speed(["--dataset", "imagenet"]).model == "resnet18"
    with pytest.raises(BenchmarkError, match="--fp-top1 is for networks"):
        parse_ablate(["--logits", "DIR", "--fp-top1", "70"])
