import copy
import hashlib
import itertools
import math

import pytest
import torch
from torch import nn

from cat_plugin import CATConfig, apply_cat
from cat_plugin.report.warnings import _chance, find_output_warnings, find_warnings
from cat_plugin.running.digests import image_digests
from tests.cat_plugin.helpers import images, model_pair, paired_logits

_, F = paired_logits(400, 10)


def test_nothing_to_say_of_a_random_sample():
    assert find_warnings(F, 400) == []
    assert find_warnings(F, 400, repeated=3, reused=0.2) == []
    assert find_warnings(F[:50], 40_000) == []  # the classes of a sample of many images


@pytest.mark.parametrize(
    ("f", "n_images", "repeated", "reused", "message"),
    [
        (F, 100, 0, None, "100 different images are few"),
        (F, 800, 400, None, "400 of 800 images repeat others"),
        (F - 100 * (torch.arange(10) > 3), 400, 0, None, "of 10 classes for these images, where a random sample has"),
        (F, 400, 0, 0.9, "90% of the images are those that the quantization was calibrated on"),
    ],
)
def test_warnings(f, n_images, repeated, reused, message):
    found = find_warnings(f, n_images, repeated, reused)
    assert len(found) == 1
    assert message in found[0]


def test_images_of_the_calibration_are_recognised(caplog):
    quantized, fp = (model.eval() for model in model_pair())
    x = images(400)
    quantized.calibration_digests = {hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in x[:300]}
    assert quantized.calibration_digests == set(image_digests(x[:300]))
    cat_model = apply_cat(quantized, fp, x)
    warning = "75% of the images are those that the quantization was calibrated on"
    assert warning in cat_model.report.warnings[0]
    assert warning in str(cat_model.report)
    assert warning in caplog.text
    cat_model.remove()
    assert apply_cat(quantized, fp, images(400, seed=1)).report.warnings == ()


def test_nothing_to_say_of_models_that_go_together():
    q, f = paired_logits(400, 10)
    assert find_output_warnings(q, f) == []
    assert find_output_warnings(q[:, :1], f[:, :1]) == []  # one class: nothing to agree on
    assert find_output_warnings(q[:8], f.flip(0)[:8]) == []  # too few to judge


def of_classes(predicted, n_classes=2):
    """Logits of which these classes (n,) are the largest."""
    noise = torch.rand(len(predicted), n_classes, generator=torch.Generator().manual_seed(len(predicted)))
    return noise + 2 * nn.functional.one_hot(predicted, n_classes)


@pytest.mark.parametrize(("n_images", "rare", "differing"), [(64, 8, 4), (256, 6, 2), (40, 1, 1), (300, 17, 17)])
def test_one_frequent_class_is_not_taken_for_chance(n_images, rare, differing):
    f = (torch.arange(n_images) < rare).long()
    q = (torch.arange(n_images) < rare - differing).long()
    assert find_output_warnings(of_classes(q), of_classes(f)) == []


def test_the_error_of_chance_is_that_over_all_pairings():
    ours, theirs = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 1, 2, 0])
    agreeing = [(ours == theirs[list(order)]).double().mean() for order in itertools.permutations(range(6))]
    chance, error = _chance(*(torch.bincount(predicted).double() / 6 for predicted in (ours, theirs)))
    assert chance == pytest.approx(torch.stack(agreeing).mean().item())
    assert error / math.sqrt(6 - 1) == pytest.approx(torch.stack(agreeing).std(correction=0).item())


def test_a_collapse_to_one_of_two_classes_is_told():
    f = (torch.arange(100) < 40).long()
    (found,) = find_output_warnings(of_classes(torch.zeros_like(f)), of_classes(f))
    assert "it predicts class 0 for 100% of the images" in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, f: (f, f), "identical outputs for all 400 images"),
        (lambda q, f: (q.softmax(1), f), "quantized_model gives probabilities"),
        (lambda q, f: (q, f.softmax(1)), "fp_model gives probabilities"),
        (lambda q, f: (q[torch.randperm(400, generator=torch.Generator().manual_seed(1))], f), "where chance has"),
        (lambda q, f: (q + 50 * (torch.arange(10) == 3), f), "it predicts class 3 for 100% of the images"),
    ],
    ids=["identical", "quantized probabilities", "fp probabilities", "chance", "collapsed"],
)
def test_models_that_do_not_go_together(change, message):
    q, f = change(*paired_logits(400, 10))
    (found,) = find_output_warnings(q, f)
    assert message in found


def test_apply_cat_says_what_the_models_look_like(caplog):
    quantized, fp = model_pair()
    fp.train()
    cat_model = apply_cat(quantized.eval(), fp, images(400), config=CATConfig.paper(num_clusters=4))
    assert any("of fp_model that behave differently in training" in warning for warning in cat_model.report.warnings)
    assert "left in training mode" in caplog.text
    assert cat_model.report.quantized_layers.total == 2
    assert "layers look quantized" in str(cat_model.report)
    cat_model.remove()
    (found,) = apply_cat(copy.deepcopy(fp).eval(), fp.eval(), images(400)).report.warnings
    assert "identical outputs" in found
