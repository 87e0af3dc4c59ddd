"""The command lines, end to end on a small folder in ImageNet's layout with random weights."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models import resnet18

from benchmarks.commands import ablate, compare, loading, report, robustness
from benchmarks.datasets.class_labels import wnids
from benchmarks.datasets.description import Request
from benchmarks.datasets.imagenet import load_imagenet
from benchmarks.datasets.images import stacked
from benchmarks.measure import fp_check
from benchmarks.networks.catalogue import TIMM, TORCHVISION
from benchmarks.networks.weights_and_transforms import load_pretrained, untrained
from tests.benchmarks.conftest import SMALL, WNIDS

N_CAT = ["--n-cat", "24"]


def results(folder):
    (run,) = folder.iterdir()
    return run


def fp_top1(root, weights):
    """By hand."""
    model, dataset = (
        load_pretrained("resnet18", str(weights), 3).model,
        load_imagenet(Request(data=root, cache=root, transform=SMALL)),
    )
    with torch.no_grad():
        right = model(stacked(dataset.test_images)).argmax(1) == dataset.test_labels
    return 100 * sum(right.tolist()) / len(right)


def test_comparison_scores_the_val_images(tiny_imagenet, shared_imagenet, imagenet_weights, tmp_path, capsys):
    assert compare.main([*tiny_imagenet, *N_CAT]) == 0
    run = results(tmp_path / "results")
    (line,) = csv.DictReader((run / "results.csv").open())
    assert (line["dataset"], line["model"], line["n_eval"], line["n_cat"]) == ("imagenet", "resnet18", "15", "24")
    assert float(line["fp_top1"]) == pytest.approx(fp_top1(shared_imagenet, imagenet_weights), abs=1e-3)
    printed = capsys.readouterr()
    assert (
        f"full-precision top-1 is not checked: no published top-1 is stored here for {imagenet_weights}; --fp"
        in printed.out
    )
    assert (run / "results.md").read_text().strip() in printed.out
    assert "resnet18 on imagenet, full-precision weights: the file resnet18.safetensors, 8 images" in printed.out
    assert json.loads((run / "settings.json").read_text())["weights"] == "the file resnet18.safetensors"
    about = json.loads((run / "environment.json").read_text())
    assert about["fp_check"].startswith("full-precision top-1 is not checked") and about["accelerator"] is None
    before = (run / "results.md").read_bytes()
    assert report.main([str(run)]) == 0
    assert "results.md (the same)" in capsys.readouterr().out and (run / "results.md").read_bytes() == before


def test_expected_accuracy_is_checked_before_anything_is_quantized(
    tiny_imagenet, shared_imagenet, imagenet_weights, tmp_path, monkeypatch, capsys
):
    def never(*args, **kwargs):
        raise AssertionError("quantized all the same")

    found = fp_top1(shared_imagenet, imagenet_weights)
    with monkeypatch.context() as patch:
        patch.setattr(compare, "measure", never)
        assert compare.main([*tiny_imagenet, *N_CAT, "--fp-top1", f"{found + 0.6:.3f}"]) == 2
    error = capsys.readouterr().err
    assert f"top-1 is {found:.3f} % on 15 images, --fp-top1 says {found + 0.6:.3f} %: -0.600 points" in error
    assert "Nothing was quantized. Likely causes:\n- an incomplete val folder: it holds 15 images" in error
    assert not (tmp_path / "results").exists()
    assert compare.main([*tiny_imagenet, *N_CAT, "--fp-top1", f"{found + 0.4:.3f}"]) == 0
    assert f"full-precision top-1 {found:.3f} % on 15 images; --fp-top1 says" in capsys.readouterr().out


def test_stopped_run_resumes_without_another_check(
    tiny_imagenet, shared_imagenet, imagenet_weights, tmp_path, monkeypatch, capsys
):
    options = [*tiny_imagenet, *N_CAT, "--bits", "2/2", "4/4", "--modes", "plain_affine"]
    options += ["--fp-top1", f"{fp_top1(shared_imagenet, imagenet_weights):.3f}"]
    real, calls, checks, check = compare.measure, [], [], fp_check._measured

    def killed_at_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(fp_check, "_measured", lambda *args: (checks.append(1), check(*args))[1])
    monkeypatch.setattr(compare, "measure", killed_at_second)
    assert compare.main(options) == 130
    assert compare.main(options) == 0
    assert "1 of 2 rows are finished already" in capsys.readouterr().out
    assert (len(calls), len(checks)) == (3, 1)
    assert len(list(csv.DictReader((results(tmp_path / "results") / "results.csv").open()))) == 2


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """One image a class and part."""
    root = tmp_path_factory.mktemp("thousand")
    generator = np.random.default_rng(1)
    for part in ("train", "val"):
        for index in range(1000):
            folder = root / part / f"n{index:08d}"
            folder.mkdir(parents=True)
            pixels = generator.integers(0, 256, (2, 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((36, 36)).save(folder / "0.JPEG")
    return root


def test_published_weights_that_are_not_as_accurate_stop_the_run(
    tiny_imagenet, thousand, tmp_path, monkeypatch, capsys
):
    """Random weights where torchvision's cache would have IMAGENET1K_V1, whose published top-1 is 69.758."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(resnet18(num_classes=1000).state_dict(), tmp_path / "torch/hub/checkpoints/resnet18-f37072fd.pth")
    options = [*tiny_imagenet, *N_CAT, "--data", str(thousand), "--weights", "DEFAULT", "--preset", "paper"]
    assert compare.main(options) == 2
    error = capsys.readouterr().err
    assert "on 1,000 images, torchvision's IMAGENET1K_V1 of resnet18 says 69.758 %: -69." in error
    assert "it holds 1,000 images, ImageNet's 50,000" in error
    assert "1,000 of 1,000 classes are called like n01440764, the first is n00000000" in error
    assert not (tmp_path / "results").exists()


def test_small_folder_is_not_for_published_weights(tiny_imagenet, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_pretrained", lambda *_: pytest.fail("weights were downloaded first"))
    assert compare.main([*tiny_imagenet, "--weights", "DEFAULT"]) == 2
    error = capsys.readouterr().err
    assert "the model has 1,000 outputs, the data 3 classes" in error and "or give a network for these classes" in error


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (compare, ["--n-calib", "20", "--n-cat", "900"], "n_calib=20 plus n_cat=900 needs 920 training images"),
        (compare, ["--n-cat", "8", "--test-folds", "2"], "--n-cat 8 asks for more than the 7 images of a fold of 15"),
        (robustness, ["--n-calib", "42"], "--n-calib 42 leaves none of the 42 training images to draw"),
    ],
)
def test_too_few_images_are_told_before_the_network_runs(
    tiny_imagenet, tmp_path, monkeypatch, capsys, command, options, message
):
    monkeypatch.setattr(loading, "check_accuracy", lambda *_, **__: pytest.fail("the network was run first"))
    assert command.main([*tiny_imagenet, "--fp-top1", "50", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_too_few_images_are_told_before_a_network_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "trained_model", lambda *_, **__: pytest.fail("the network was trained first"))
    assert compare.main(["--n-cat", "5000", "--results", str(tmp_path), "--cache", str(tmp_path)]) == 2
    assert "n_cat=5000 needs 5256 training images, there are 1297" in capsys.readouterr().err


def test_failed_download_is_told_whatever_classes_the_data_may_have(tiny_imagenet, tmp_path, monkeypatch, capsys):
    for part in ("train", "val"):
        for index, name in enumerate(wnids()[:3]):
            (tmp_path / "real" / part / name).mkdir(parents=True)
            for image in range(12):
                color = 20 * index + image, image, 100 * (part == "val")
                Image.new("RGB", (36, 36), color).save(tmp_path / "real" / part / name / f"{image}.png")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", fail)
    options = [*tiny_imagenet, "--data", str(tmp_path / "real"), "--weights", "DEFAULT", "--n-cat", "8"]
    assert compare.main(options) == 2
    assert "IMAGENET1K_V1 of resnet18 could not be downloaded or read (no network)" in capsys.readouterr().err


def test_random_weights_are_no_result(tiny_imagenet, capsys):
    assert compare.main([*tiny_imagenet, *N_CAT, "--weights", "random"]) == 0
    printed = capsys.readouterr().out
    assert "weights are random, so that no accuracy here is a result" in printed and "--fp-top1" not in printed


def test_damaged_image_ends_with_one_line(tiny_imagenet, imagenet_folder, capsys):
    (imagenet_folder / "val" / WNIDS[2] / "val_3.JPEG").write_bytes(b"no image")
    assert compare.main([*tiny_imagenet, *N_CAT, "--data", str(imagenet_folder), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert "val_3.JPEG cannot be read as an image" in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_ablation_and_robustness_draw_files_too(tiny_imagenet, tmp_path, capsys):
    assert robustness.main([*tiny_imagenet, "--images", "8", "--max-draws", "2"]) == 0
    run = results(tmp_path / "results")
    lines = list(csv.DictReader((run / "results.csv").open()))
    assert {line["source"] for line in lines} == {"imagenet-resnet18-rtn-w4a4-seed0"}
    # 34 training images are left, but only what is drawn, two times 8, has run through the networks.
    assert [line["draw"] for line in lines if line["mode"] == "output"] == ["0", "1"]
    (logits,) = (tmp_path / "cache" / "logits").iterdir()
    assert load_file(logits)["fit_q"].shape == (16, 3)
    options = ["--factors", "alpha=0.5,1", "--n-cat", "16", "--max-draws", "1", "--results", str(tmp_path / "ablated")]
    assert ablate.main([*tiny_imagenet, *options]) == 0
    lines = list(csv.DictReader((results(tmp_path / "ablated") / "alpha.csv").open()))
    assert [line["value"] for line in lines] == ["0.5", "1.0"]
    capsys.readouterr()
    assert report.main([str(results(tmp_path / "ablated"))]) == 0
    assert "alpha.csv (the same)" in capsys.readouterr().out


CODE = """
import torch
from torch import nn
from torchvision.transforms._presets import ImageClassification

def tiny():
    features = nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*features, nn.Linear(8, 3)), ImageClassification(crop_size=32, resize_size=36)
"""


@pytest.fixture
def own_network(shared_imagenet, tmp_path, monkeypatch):
    """A script with a function, and all test images in one flat folder with a file of labels."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_network", raising=False)
    (tmp_path / "own_network.py").write_text(CODE)
    (tmp_path / "flat").mkdir()
    lines = []
    for label, name in enumerate(WNIDS):
        for path in sorted((shared_imagenet / "train" / name).iterdir()):
            shutil.copy(path, tmp_path / "flat" / f"{name}_{path.name}")
            lines.append(f"{name}_{path.name} {label}\n")
    (tmp_path / "flat" / "val.txt").write_text("".join(lines))
    yield [
        *("--dataset", "imagenet", "--data", str(tmp_path / "flat"), "--model-fn", f"{tmp_path}/own_network.py:tiny"),
        *(
            "--methods",
            "rtn",
            "--bits",
            "4/4",
            "--n-calib",
            "8",
            "--batch-size",
            "4",
            "--modes",
            "plain_affine",
            "output",
        ),
        *(
            "--workers",
            "0",
            "--results",
            str(tmp_path / "results"),
            "--cache",
            str(tmp_path / "cache"),
            "--no-progress",
        ),
    ]
    sys.modules.pop("own_network", None)


def test_own_network_runs_on_a_flat_folder_and_resumes(own_network, tmp_path, capsys):
    assert compare.main([*own_network, "--n-cat", "12"]) == 0
    run = results(tmp_path / "results")
    (line,) = csv.DictReader((run / "results.csv").open())
    assert (line["model"], line["n_eval"], line["n_cat"], line["test_folds"]) == ("tiny", "21", "12", "1")
    assert "weights: those of tiny in own_network.py, 8 images for quantization, 12 others" in capsys.readouterr().out
    assert compare.main([*own_network, "--n-cat", "12"]) == 0
    assert "1 of 1 rows are finished already" in capsys.readouterr().out
    # Another network by the same name and with the same weights is another run, and not taken from the cache.
    sys.modules.pop("own_network")
    (tmp_path / "own_network.py").write_text(CODE.replace("stride=4", "stride=3"))
    assert compare.main([*own_network, "--n-cat", "12"]) == 0
    assert len(list((tmp_path / "results").iterdir())) == 2


def test_folds_test_all_images_but_those_of_quantization_and_the_table_says_so(own_network, tmp_path, capsys):
    assert compare.main([*own_network, "--test-folds", "2"]) == 0
    run = results(tmp_path / "results")
    (line,) = csv.DictReader((run / "results.csv").open())
    assert (line["n_eval"], line["n_calib"], line["n_cat"], line["test_folds"]) == ("34", "8", "17", "2")
    told = "8 images for quantization, corrections fitted on 17 images of one half of the test images and tested on the"
    assert told in capsys.readouterr().out
    before = (run / "results.md").read_bytes()
    assert report.main([str(run)]) == 0
    assert (run / "results.md").read_bytes() == before
    assert compare.main([*own_network, "--test-folds", "2", "--n-cat", "18"]) == 2
    assert "--n-cat 18 asks for more than the 17 images of a fold of 34; lower it" in capsys.readouterr().err


def test_image_in_both_folds_is_a_leak(own_network, tmp_path, capsys):
    flat = tmp_path / "flat"
    names = [line.split()[0] for line in (flat / "val.txt").read_text().splitlines()]
    for index, name in enumerate(names):
        shutil.copy(flat / names[0], flat / name) if index % 2 else None
    assert compare.main([*own_network, "--test-folds", "2"]) == 2
    assert "are test images, such as number" in capsys.readouterr().err


def test_broken_image_and_label_outside_the_outputs_end_with_one_line(own_network, tmp_path, capsys):
    table = tmp_path / "flat" / "val.txt"
    table.write_text(table.read_text() + table.read_text().splitlines()[0].rsplit(" ", 1)[0] + " 3\n")
    assert compare.main([*own_network, "--n-cat", "12"]) == 2
    error = capsys.readouterr().err
    assert "1 label of test images not among the classes: 3; expected those of 0 to 2" in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_three_places_for_the_other_commands_too(own_network, shared_imagenet, tmp_path, capsys):
    places = ["--calib-data", str(shared_imagenet / "train"), "--cat-data", str(tmp_path / "flat")]
    places += ["--test-data", str(shared_imagenet / "val")]
    options = [each for each in own_network if each not in ("--modes", "plain_affine", "output")]
    options[options.index("--data") : options.index("--data") + 2] = places
    assert robustness.main([*options, "--images", "20", "--max-draws", "9"]) == 0
    lines = list(csv.DictReader((results(tmp_path / "results") / "results.csv").open()))
    # All 42 images of the second place are left, whatever quantization takes of the first.
    assert [line["draw"] for line in lines if line["mode"] == "output"] == ["0", "1"]
    assert {line["n_eval"] for line in lines} == {"15"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TORCHVISION, *TIMM])
def test_every_network_runs_at_its_own_image_size(name, shared_imagenet, cheap_ranges, tmp_path, monkeypatch):
    if name in TIMM:
        pytest.importorskip("timm")
    model = untrained(name, 3, seed=1)
    head = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1]
    torch.nn.init.normal_(head.weight)  # zero in torchvision's ViT, so that all images would have the same logits
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    options = ["--dataset", "imagenet", "--data", str(shared_imagenet), "--model", name, "--workers", "0"]
    options += ["--weights", str(tmp_path / "weights.safetensors"), "--methods", "rtn", "--bits", "4/4"]
    options += ["--n-calib", "4", "--n-cat", "8", "--batch-size", "4", "--modes", "plain_affine", "layers"]
    options += ["--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"), "--no-progress"]
    shapes, real = [], loading.check_outputs
    monkeypatch.setattr(
        loading, "check_outputs", lambda model, images, *rest: (shapes.append(images.shape), real(model, images, *rest))
    )
    assert compare.main(options) == 0
    assert shapes == [(1, 3, 224, 224)]
    found = json.loads((results(tmp_path / "results") / "results.json").read_text())
    (row,) = found["results"]
    assert (row["model"], row["n_eval"], row["n_calib"], row["n_cat"]) == (name, 15, 4, 8)
