import pytest
import torch

from cat_plugin import CATError
from cat_plugin.running.checks import Faults, check_finite, check_same_shape

NAN, INF = float("nan"), float("inf")
LOGITS = torch.tensor([[NAN, 1.0, -INF], [0.0, 1e30, -1e30], [INF, 0.0, 0.0]])
MESSAGE = r"^lq gave 3 NaN or infinite logits, in 2 of {} images; check its scales"


def test_shapes_that_differ_are_all_named():
    shape = torch.Size([4, 10])
    check_same_shape({"lq": shape, "fp": torch.Size([4, 10])})
    check_same_shape({"lq": shape})
    found = r"^outputs differ in shape .*: lq \(4, 10\), fp \(4, 9\), cat \(4, 10\); expected the same classes$"
    with pytest.raises(CATError, match=found):
        check_same_shape({"lq": shape, "fp": torch.Size([4, 9]), "cat": shape})


def test_values_that_are_not_finite_are_counted_with_their_images():
    check_finite(LOGITS[1:2], "lq")
    check_finite(torch.empty(0, 3), "lq")
    with pytest.raises(CATError, match=MESSAGE.format(3)):
        check_finite(LOGITS, "lq")


def test_faults_of_batches_add_up():
    faults = Faults("lq")
    faults.tell()
    for part in (LOGITS[:1], LOGITS[1:2].repeat(7, 1), LOGITS[2:].half()):
        faults.look(part)
    with pytest.raises(CATError, match=MESSAGE.format(9)):
        faults.tell()
