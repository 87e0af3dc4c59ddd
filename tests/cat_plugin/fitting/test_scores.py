import pytest
import torch

from cat_plugin.fitting.scores import HeldOutScores
from cat_plugin.metrics import ClassChanges

F = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
Q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])


def test_table_computed_by_hand():
    """Two of five agree, of the corrected ones four: class 0 wins two images, class 1 wins one and loses one."""
    out = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    scores = HeldOutScores.of(F, Q, out)
    assert (scores.agreement_before, scores.agreement_after, scores.agreement_gain) == (40.0, 80.0, 40.0)
    assert scores.classes == ClassChanges(2, labels=(0, 1), won=(2, 1), lost=(0, 1))
    # With p = 1 / (1 + e^-2), KL to the same is 0 and to the reverse is 2 (2 p - 1).
    p, half = 1 / (1 + torch.tensor(-2.0).exp().item()), 1 / (1 + torch.tensor(-1.0).exp().item())
    reverse = 2 * (2 * p - 1)
    assert scores.kl_after == pytest.approx(reverse / 5, rel=1e-6)
    logs = torch.tensor([p / half, (1 - p) / (1 - half), p / (1 - half), (1 - p) / half]).log().tolist()
    near, far = p * logs[0] + (1 - p) * logs[1], p * logs[2] + (1 - p) * logs[3]
    assert scores.kl_before == pytest.approx((2 * near + 3 * far) / 5, rel=1e-5)
    assert scores.gain_low < 40 < scores.gain_high
    assert scores.summary() == [
        "agreement with FP 40.00 -> 80.00 %",
        f"KL {scores.kl_before:.4f} -> {scores.kl_after:.4f} nats",
    ]
    assert str(scores).startswith("agreement with FP 40.00 -> 80.00 % (+40.00, 95 % CI ")
    assert str(scores).endswith(f"KL(FP || output) {scores.kl_before:.4f} -> {scores.kl_after:.4f} nats")


def test_interval_of_positions_is_that_of_images():
    copies = torch.arange(5).repeat_interleave(50)
    plain = HeldOutScores.of(F, Q, F, torch.arange(5))
    many = HeldOutScores.of(F[copies], Q[copies], F[copies], copies)
    assert (many.agreement_gain, many.kl_before) == pytest.approx((plain.agreement_gain, plain.kl_before))
    assert (many.gain_low, many.gain_high) == pytest.approx((plain.gain_low, plain.gain_high))
    as_images = HeldOutScores.of(F[copies], Q[copies], F[copies])
    assert as_images.gain_high - as_images.gain_low < 0.3 * (many.gain_high - many.gain_low)
