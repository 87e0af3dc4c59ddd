import pytest
import torch
from torch import nn

from cat_plugin import CATConfig, apply_cat
from cat_plugin.fitting.fit import fit_and_score
from cat_plugin.fitting.store import LogitStore
from cat_plugin.kinds import SOFTMAX
from cat_plugin.layers.evidence import Closeness, faults
from tests.cat_plugin.layers.networks import Net, pictures, planted


def test_a_model_that_is_as_good_as_full_precision_is_left_alone():
    quantized, fp = planted(size=0.0, rounding=nn.Identity)
    cat_model = apply_cat(quantized, fp, pictures(80), config=CATConfig(layers="all"))
    assert cat_model.layers == {} and not cat_model.report.layers.accepted
    assert cat_model.report.layers.reason.startswith("nothing to gain: against the model as it is, the divergence")
    assert torch.equal(cat_model(pictures(9)), fp(pictures(9)))


class Noise(nn.Module):
    """An error that depends on each image alone, by its bits, so that nothing can be learned of it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        seeds = (x.flatten(1)[:, :5] * 1e6).frac()
        return self.model(x) + 3 * seeds


@pytest.mark.parametrize("seed", range(2))
def test_pure_noise_leads_to_no_layers(seed):
    fp = Net(rounding=nn.Identity).eval()
    quantized = Noise(Net(rounding=nn.Identity)).eval()
    quantized.model.load_state_dict(fp.state_dict())
    cat_model = apply_cat(quantized, fp, pictures(100, seed), config=CATConfig(layers="all", seed=seed))
    assert cat_model.layers == {} and "nothing to gain" in cat_model.report.layers.reason


@pytest.mark.parametrize("config", [CATConfig(layers="none"), CATConfig.paper(4)], ids=["none", "paper"])
def test_without_layers_it_is_the_fit_of_the_output(config):
    quantized, fp = planted()
    x = pictures(100)
    with torch.no_grad():
        alone = fit_and_score(LogitStore.of(quantized(x), fp(x)), config)
    cat_model = apply_cat(quantized, fp, x, config=config)
    assert cat_model.report.layers is None and cat_model.layers == {}
    assert cat_model.report.held_out == alone.scores
    for found, expected in zip(cat_model.correction.buffers(), alone.correction.buffers(), strict=True):
        assert torch.equal(found, expected)


def table(n=200, errors=(1.0, 0.3), seed=0):
    """Full-precision logits, and two that are so far from them."""
    generator = torch.Generator().manual_seed(seed)
    f = 3 * torch.randn(n, 4, generator=generator)
    return f, *(f + error * torch.randn(n, 4, generator=generator) for error in errors)


def test_evidence_speaks_for_what_is_nearer_alone():
    f, far, near = table()
    assert faults(SOFTMAX, f, near, {"it": far}, None) == []
    (divergence, agreement) = faults(SOFTMAX, f, far, {"it": near}, None)
    assert divergence.startswith("against it, the divergence changes by +") and "fewer predictions agree" in agreement
    (same,) = faults(SOFTMAX, f, far, {"it": far}, None)
    assert same.startswith("against it, the divergence changes by ")
    assert len(faults(SOFTMAX, f, near, {"one": far, "two": near}, None)) == 1


def test_positions_of_few_images_are_no_evidence():
    """Where all positions of an image err alike, they count as one."""
    f, far, near = table(4)
    rows = [part.repeat_interleave(100, dim=0) for part in (f, near, far)]
    owners = torch.arange(4).repeat_interleave(100)
    assert faults(SOFTMAX, rows[0], rows[1], {"it": rows[2]}, None) == []
    assert faults(SOFTMAX, rows[0], rows[1], {"it": rows[2]}, owners) == faults(SOFTMAX, f, near, {"it": far}, None)


def test_closeness_by_hand():
    f, out = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    p = torch.tensor([2.0, 0.0]).softmax(0)
    expected = (p * (p / p.flip(0)).log()).sum().item() / 2
    found = Closeness.of(f, out, SOFTMAX)
    assert found.divergence == pytest.approx(expected) and found.agreement == 50.0
    assert str(found) == f"{expected:.4f}, 50.00 % agree"
