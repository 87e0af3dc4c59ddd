"""The command lines, end to end on a small folder in ImageNet's layout with random weights."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models import resnet18

from benchmarks.commands import ablate, compare, loading, report, robustness
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
    model, dataset = load_pretrained("resnet18", str(weights), 3).model, load_imagenet(root, SMALL, 0)
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
    options = [*tiny_imagenet, "--data", str(thousand), "--weights", "DEFAULT", "--preset", "paper"]
    assert compare.main(options) == 2
    error = capsys.readouterr().err
    assert "on 1,000 images, torchvision's IMAGENET1K_V1 of resnet18 says 69.758 %: -69." in error
    assert "it holds 1,000 images, ImageNet's 50,000" in error
    assert "1,000 of 1,000 class folders are called like n01440764, the first is n00000000" in error
    assert not (tmp_path / "results").exists()


def test_small_folder_is_not_for_published_weights(tiny_imagenet, capsys):
    assert compare.main([*tiny_imagenet, "--weights", "DEFAULT"]) == 2
    assert "resnet18 IMAGENET1K_V1 have 1,000 outputs, the data 3 class folders" in capsys.readouterr().err


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
