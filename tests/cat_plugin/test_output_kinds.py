"""Heads that are no softmax classifier's: one logit, several labels, values."""

import copy

import pytest
import torch
from torch import nn

from cat_plugin import CATConfig, CATError, CATWrapper, apply_cat, compare_accuracy
from tests.cat_plugin.helpers import images

X, FRESH = images(1024), images(2000, seed=1)


def pair(outputs, seed=0):
    """`(quantized, fp)` with a coarse last layer and a wrong bias."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fp = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs)).eval()
    quantized = copy.deepcopy(fp)
    with torch.no_grad():
        quantized[2].weight.copy_((quantized[2].weight / 0.2).round() * 0.2)
        quantized[2].bias += 0.3
    return quantized, fp


@torch.no_grad()
def signs_agree(quantized, fp):
    return 100 * ((quantized(FRESH) > 0) == (fp(FRESH) > 0)).double().mean().item()


def test_one_logit_is_that_of_two_classes():
    quantized, fp = pair(1)
    before = signs_agree(quantized, fp)
    cat_model = apply_cat(quantized, fp, X)
    assert before < 70
    assert signs_agree(quantized, fp) > before + 20
    held_out = cat_model.report.held_out
    assert held_out.agreement_before == pytest.approx(before, abs=5)
    assert held_out.agreement_after > before + 20
    assert cat_model.correction.num_classes == 2
    assert quantized(FRESH).shape == (2000, 1)


def test_one_logit_is_corrected_as_the_same_two_columns_are():
    class Two(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            z = self.net(x)
            return torch.cat([torch.zeros_like(z), z], dim=1)

    quantized, fp = pair(1)
    two = Two(copy.deepcopy(quantized)), Two(copy.deepcopy(fp))
    apply_cat(quantized, fp, X)
    apply_cat(*two, X)
    out = two[0](FRESH)
    torch.testing.assert_close(quantized(FRESH)[:, 0], out[:, 1] - out[:, 0])


def test_one_logit_a_position():
    class Segmenter(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.movedim(1, -1)).movedim(-1, 1)

    quantized, fp = pair(1)
    maps = images(60 * 20).reshape(60, 20, 6).movedim(-1, 1).unsqueeze(-1)
    low, full = Segmenter(quantized), Segmenter(fp)
    apply_cat(low, full, maps)
    assert low(maps).shape == full(maps).shape == (60, 1, 20, 1)
    assert ((low(maps) > 0) == (full(maps) > 0)).double().mean() > 0.85


def test_accuracy_of_one_logit():
    quantized, fp = pair(1)
    with torch.no_grad():
        labels = (fp(FRESH)[:, 0] > 0).long()
    cat_model = apply_cat(quantized, fp, X, eval_loader=[(FRESH, labels)])
    accuracy = cat_model.report.accuracy
    assert accuracy.fp_top1 == 100
    assert accuracy.cat_top1 == pytest.approx(signs_agree(quantized, fp))
    assert accuracy.quantized_top1 < accuracy.cat_top1 - 20
    assert compare_accuracy(fp, quantized, cat_model, [(FRESH, labels)]).cat_top1 == accuracy.cat_top1


@pytest.mark.parametrize(("kind", "warned"), [("auto", True), ("softmax", False), ("value", False)])
def test_single_outputs_may_be_values(kind, warned):
    report = apply_cat(*pair(1), X, config=CATConfig(output_kind=kind)).report
    assert any("single outputs" in warning for warning in report.warnings) == warned


def test_labels_that_do_not_exclude_each_other():
    quantized, fp = pair(7)
    before = signs_agree(quantized, fp)
    cat_model = apply_cat(quantized, fp, X, config=CATConfig(output_kind="sigmoid"))
    assert signs_agree(quantized, fp) > before + 3
    held_out = cat_model.report.held_out
    assert held_out.agreement_before == pytest.approx(before, abs=2)
    assert held_out.agreement_after == pytest.approx(signs_agree(quantized, fp), abs=2)


def test_softmax_would_lose_what_labels_have_in_common():
    """A shift of all logits changes no class, and every label."""
    _, fp = pair(7)
    quantized = copy.deepcopy(fp)
    with torch.no_grad():
        quantized[2].bias += 0.5
    before = signs_agree(quantized, fp)
    apply_cat(quantized, fp, X, config=CATConfig(output_kind="softmax")).remove()
    assert signs_agree(quantized, fp) == before < 90
    apply_cat(quantized, fp, X, config=CATConfig(output_kind="sigmoid"))
    assert signs_agree(quantized, fp) > 98


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_values_come_nearer_in_any_unit(outputs, unit):
    quantized, fp = pair(outputs)
    for net in (quantized, fp):
        net.append(nn.Linear(outputs, outputs, bias=False))
        with torch.no_grad():
            net[3].weight.copy_(unit * torch.eye(outputs))
    with torch.no_grad():
        before = (quantized(FRESH) - fp(FRESH)).square().mean()
        cat_model = apply_cat(quantized, fp, X, config=CATConfig(output_kind="value"))
        after = (quantized(FRESH) - fp(FRESH)).square().mean()
    assert after < 0.3 * before
    assert cat_model.report.held_out.mse_before == pytest.approx(before.item(), rel=0.2)
    assert cat_model.report.held_out.mse_after == pytest.approx(after.item(), rel=0.5)
    assert str(cat_model.report)


def test_values_without_a_gain_are_left_alone():
    quantized, fp = pair(3)
    quantized.load_state_dict(fp.state_dict())
    with torch.no_grad():
        quantized[2].bias += 1e-9
    cat_model = apply_cat(quantized, fp, X[:30], config=CATConfig(output_kind="value"))
    assert cat_model.report.evidence is not None


def test_what_accuracy_cannot_be_measured_on():
    with pytest.raises(CATError, match=r"eval_loader= with output_kind='sigmoid': accuracy is measured on one class"):
        apply_cat(*pair(3), X, config=CATConfig(output_kind="sigmoid"), eval_loader=[(X, torch.zeros(1024).long())])


def test_kind_is_one_of_four():
    with pytest.raises(CATError, match="output_kind='regression' should be one of 'auto', 'softmax', 'sigmoid', 'va"):
        CATConfig(output_kind="regression")


def test_labels_and_probabilities_are_told_where_they_can_be():
    class Shifted(nn.Module):
        def __init__(self, net, then):
            super().__init__()
            self.net, self.then = net, then

        def forward(self, x):
            return self.then(self.net(x))

    def warnings(then):
        return "\n".join(apply_cat(*(Shifted(net, then) for net in pair(7)), X).report.warnings)

    assert "say output_kind='sigmoid'" in warnings(lambda z: 3 * z - 5)
    assert "all are between 0 and 1, as after a sigmoid" in warnings(torch.sigmoid)
    assert "add up to 1, as after a softmax" in warnings(lambda z: z.softmax(dim=1))
    assert "sigmoid" not in warnings(lambda z: z)


def test_saved_and_loaded(tmp_path):
    quantized, fp = pair(1)
    cat_model = apply_cat(quantized, fp, X)
    expected = quantized(FRESH)
    cat_model.save_pretrained(tmp_path)
    cat_model.remove()
    loaded = CATWrapper.from_pretrained(tmp_path, quantized)
    torch.testing.assert_close(quantized(FRESH), expected)
    torch.testing.assert_close(loaded.bake()(FRESH), expected)
