import math

import torch

from benchmarks.measure.accuracy import Measurement
from benchmarks.measure.paired_logits import PairedLogits, rank_name, ranks


def pairs(classes: int, images: int = 200, seed: int = 0) -> PairedLogits:
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(images, classes, generator=generator) for _ in range(4)]
    labels = torch.randint(classes, (images,), generator=generator)
    return PairedLogits(fit_q=logits[0], fit_f=logits[1], test_q=logits[2], test_f=logits[3], labels=labels)


def test_rank_counts_what_stands_before_the_label():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 2.0], [1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    labels = torch.tensor([0, 2, 1, 2, 1])
    assert ranks(logits, labels).tolist() == [0, 2, 0, 1, 1]


def test_many_classes_have_ranks_that_agree_with_the_predictions_and_with_topk():
    found = pairs(100)
    rounded = {"output": found.test_q.round()}  # many equal logits
    predictions = found.score(rounded) | found.ranks(rounded)
    labels, figures = predictions["labels"], Measurement.figures(predictions)
    for name, logits in (("fp", found.test_f), ("lq", found.test_q), ("output", found.test_q.round())):
        assert torch.equal(predictions[rank_name(name)] == 0, predictions[name] == labels)
        if name != "output":  # which of equal ones topk takes is not said
            hits = (logits.topk(5).indices == found.labels[:, None]).any(1)
            assert figures[f"{name}_top5"] == round(100 * hits.double().mean().item(), 4)
    assert figures["layers_top5"] is None


def test_few_classes_have_none():
    assert pairs(10).ranks({}) == {}
    assert Measurement.figures(pairs(10).score({}))["fp_top5"] is None


def test_what_is_no_number_is_never_a_hit():
    logits = torch.tensor([[1.0, math.nan, 0.0, 2.0]] * 2 + [[math.nan] * 4])
    labels = torch.tensor([1, 3, 2])
    assert (ranks(logits, labels) == 0).tolist() == [False, False, False]
