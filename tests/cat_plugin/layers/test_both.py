import pytest
import torch
from torch import nn

from cat_plugin import CATConfig, apply_cat
from cat_plugin.fitting.fit import fit_and_score
from cat_plugin.fitting.store import LogitStore
from cat_plugin.kinds import SOFTMAX, VALUE
from cat_plugin.layers.evidence import Closeness, faults
from tests.cat_plugin.layers.networks import Net, pictures, planted


def test_a_model_that_is_as_good_as_full_precision_is_left_alone():
    quantized, fp = planted(size=0.0, rounding=nn.Identity)
    cat_model = apply_cat(quantized, fp, pictures(80), config=CATConfig(layers="all"))
    assert cat_model.layers == {} and not cat_model.report.layers.accepted
    assert cat_model.report.layers.reason.startswith("nothing to gain: ")
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
    for margin in (True, False):
        assert faults(SOFTMAX, f, near, far, None, margin=margin) == []
        (softened, divergence, agreement) = faults(SOFTMAX, f, far, near, None, margin=margin)
        assert softened.startswith("softened KL changes by +") and "fewer predictions agree" in agreement
        assert divergence.startswith("the divergence changes by +")
    (softened, same, unchanged) = faults(SOFTMAX, f, far, far, None, margin=True)
    assert softened.startswith("softened KL changes by +0.0000")
    assert same.startswith("the divergence changes by +0.0000")
    assert unchanged.startswith("corrections would change 0.00 %")


@pytest.mark.parametrize("margin", [True, False])
def test_outputs_that_are_only_less_sure_are_no_gain(margin):
    """The divergence falls where outputs that err are made smaller, though no prediction is nearer."""
    f, far, _ = table(n=2000, errors=(3.0, 0.3))
    smaller = 0.6 * far + 0.1 * torch.randn(far.shape, generator=torch.Generator().manual_seed(1))
    fall = SOFTMAX.divergence(f, far) - SOFTMAX.divergence(f, smaller)
    assert fall.mean() > 5 * fall.std() / len(f) ** 0.5
    assert any(fault.startswith("softened KL") for fault in faults(SOFTMAX, f, smaller, far, None, margin=margin))


def test_values_have_a_scale_of_their_own():
    f, far, near = table()
    assert faults(VALUE, f, near, far, None, margin=True) == []
    (fault,) = faults(VALUE, f, far, near, None, margin=True)
    assert fault.startswith("squared error (scaled) changes by +")
    assert faults(VALUE, f, f, 0.5 * f, None, margin=True) == []


def test_a_small_fall_is_enough_without_a_margin_alone():
    """One image of 200 is a little nearer: no more than chance."""
    f, far, _ = table()
    nearer = far.clone()
    nearer[:10] += 0.2 * (f - far)[:10]
    nearer[10:20] -= 0.15 * (f - far)[10:20]
    assert any("divergence" in fault for fault in faults(SOFTMAX, f, nearer, far, None, margin=True))
    before, after = (SOFTMAX.divergence(f, out).mean().item() for out in (far, nearer))
    found = faults(SOFTMAX, f, nearer, far, None, margin=False)
    assert any("divergence" in fault for fault in found) == (after >= before)


def test_positions_of_few_images_are_no_evidence():
    """Where all positions of an image err alike, they count as one."""
    f, far, near = table(4)
    rows = [part.repeat_interleave(100, dim=0) for part in (f, near, far)]
    owners = torch.arange(4).repeat_interleave(100)
    assert faults(SOFTMAX, *rows, None, margin=True) == []
    assert faults(SOFTMAX, *rows, owners, margin=True) == faults(SOFTMAX, f, near, far, None, margin=True)


def test_closeness_by_hand():
    f, out = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    p = torch.tensor([2.0, 0.0]).softmax(0)
    expected = (p * (p / p.flip(0)).log()).sum().item() / 2
    found = Closeness.of(f, out, SOFTMAX)
    assert found.divergence == pytest.approx(expected) and found.agreement == 50.0
    assert str(found) == f"{expected:.4f}, 50.00 % agree"
