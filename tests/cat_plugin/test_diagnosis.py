import hashlib

import pytest
import torch

from cat_plugin import apply_cat
from cat_plugin.diagnosis import find_warnings, image_digests
from tests.cat_plugin.helpers import images, model_pair, paired_logits

Q, F = paired_logits(400, 10)


def test_nothing_to_say_of_a_random_sample():
    assert find_warnings(Q, F) == []
    assert find_warnings(Q, F, reused=0.2) == []


@pytest.mark.parametrize(
    ("q", "f", "reused", "message"),
    [
        (Q[:100], F[:100], None, "100 images are few"),
        (Q.repeat(2, 1), F.repeat(2, 1), None, "400 of 800 images repeat others"),
        (
            Q,
            F - 100 * (torch.arange(10) > 3),
            None,
            "of 10 classes for these images, where a random sample has about 10",
        ),
        (Q, F, 0.9, "90% of the images are those that the quantization was calibrated on"),
    ],
)
def test_warnings(q, f, reused, message):
    found = find_warnings(q, f, reused)
    assert len(found) == 1
    assert message in found[0]


def test_images_of_the_calibration_are_recognised(caplog):
    quantized, fp = model_pair()
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
