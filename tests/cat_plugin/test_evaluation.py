import json

import pytest
import torch
from torch import nn

from cat_plugin import CATError, CATWrapper, ClusterAffine, compare_accuracy
from cat_plugin.metrics import ClassChanges
from tests.cat_plugin.helpers import images, model_pair, state_of


class Lookup(nn.Module):
    """Image number i, given as its input, has logits `table[i]`."""

    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, x):
        return self.table[x[:, 0].long()]


def _one_hot(predictions, classes=6):
    """Logits that fall from the predicted class upwards (cyclically), so that top-5 misses only the last."""
    columns = torch.arange(classes)
    return torch.stack([-((columns - p) % classes).float() for p in predictions])


X = torch.arange(8.0).unsqueeze(1)
Y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def test_table_computed_by_hand():
    fp = Lookup(_one_hot([0, 0, 0, 0, 1, 1, 1, 2]))  # the last one's class 1 is sixth
    quantized = Lookup(_one_hot([0, 0, 0, 1, 0, 0, 0, 0]))
    corrected = Lookup(_one_hot([0, 0, 1, 0, 1, 1, 0, 0]))
    report = compare_accuracy(fp, quantized, corrected, [(X[:5], Y[:5]), (X[5:], Y[5:])])
    assert (report.images, report.top_k) == (8, 5)
    assert (report.fp_top1, report.quantized_top1, report.cat_top1) == (87.5, 37.5, 62.5)
    assert (report.fp_top5, report.quantized_top5, report.cat_top5) == (87.5, 87.5, 87.5)
    assert (report.paired.won, report.paired.lost, report.paired.delta) == (3, 1, 25.0)
    assert report.classes == ClassChanges(6, labels=(0, 1), won=(1, 2), lost=(1, 0))
    assert report.paired.p_value == pytest.approx(2 * 5 / 16)
    assert "FP 87.50, quantized 37.50, with CAT 62.50 (+25.00, 95 % CI" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["paired"]["won"] == 3


def test_top_k_of_few_classes():
    model = Lookup(_one_hot([0] * 8, classes=3))
    report = compare_accuracy(model, Lookup(model.table.clone()), Lookup(model.table.clone()), [(X, Y)])
    assert (report.top_k, report.fp_top5) == (3, 100.0)


def test_plain_output_of_the_hooked_model_is_compared():
    fp, quantized = Lookup(_one_hot([0] * 4 + [1] * 4)), Lookup(_one_hot([0] * 8))
    shift = torch.zeros(1, 6)
    shift[0, 1] = 100.0  # always class 1
    correction = ClusterAffine(torch.zeros(6, 1), torch.zeros(1), torch.ones(1, 6), shift)
    cat_model = CATWrapper(quantized, correction)
    for plain in (quantized, cat_model):
        report = compare_accuracy(fp, plain, cat_model, [(X, Y)])
        assert (report.quantized_top1, report.cat_top1) == (50.0, 50.0)
        assert (report.paired.won, report.paired.lost) == (4, 4)
    assert cat_model(X).argmax(dim=1).tolist() == [1] * 8


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (images(), "accuracy needs class labels, and the loader yields none"),
        ([(images(8), torch.rand(8))], "accuracy needs class labels"),
        ([], "the loader yielded no images"),
        ([(images(8), torch.arange(8) + 3)], "labels run from 3 to 10, the models have 10 classes"),
        ([(images(8), torch.arange(8) - 1)], "labels run from -1 to 6"),
        ([(images(8) * float("nan"), torch.arange(8))], "fp_model gave 80 NaN or infinite logits, in 8 of 8 images"),
    ],
)
def test_errors_restore_the_models(loader, message):
    quantized, fp = model_pair()
    cat_model = CATWrapper(quantized, ClusterAffine.identity(10))
    before = state_of(fp, cat_model)
    with pytest.raises(CATError, match=message):
        compare_accuracy(fp, quantized, cat_model, loader)
    assert state_of(fp, cat_model) == before


def test_no_module():
    quantized, fp = model_pair()
    with pytest.raises(CATError, match="cat_model is a NoneType; expected a torch"):
        compare_accuracy(fp, quantized, None, images())
