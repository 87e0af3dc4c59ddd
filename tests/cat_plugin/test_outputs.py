from collections import OrderedDict

import pytest
import torch

from cat_plugin import CATError
from cat_plugin.outputs import extract, insert


def test_tensor_goes_through():
    logits, other = torch.randn(3, 4), torch.randn(3, 4)
    assert extract(logits) is logits
    assert insert(logits, other) is other


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(3), r"lq returned a tensor of shape \(3,\) and dtype torch.float32"),
        (torch.zeros(2, 3, 4), r"lq returned a tensor of shape \(2, 3, 4\)"),
        (torch.zeros(2, 3, dtype=torch.int64), "dtype torch.int64; expected floating-point logits"),
        ((torch.zeros(2, 3), None), r"lq returned a tuple of 2: \(Tensor, NoneType\)"),
        ([], "lq returned a list of 0"),
        (OrderedDict(out=1), r"lq returned a OrderedDict with keys \['out'\]"),
        (None, "lq returned a NoneType"),
    ],
)
def test_other_outputs_are_named(output, message):
    with pytest.raises(CATError, match=message):
        extract(output, "lq")
