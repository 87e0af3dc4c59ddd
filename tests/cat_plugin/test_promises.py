"""What the default promises, on real logits and where nothing can be gained; and that its constants are what does it.

The logits are those of a MobileNetV2 on CIFAR-10, rounded to nearest at W4A2 and W4A4: `tests/data`.
"""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cat_plugin import CATConfig, apply_cat, fit_cluster_affine
from cat_plugin.fitting import auto, evidence, families, weights
from cat_plugin.fitting.fit import fit_and_score
from cat_plugin.fitting.store import LogitStore

DATA = Path(__file__).parents[1] / "data" / "mobilenetv2_rtn_logits.npz"


@functools.cache
def logits(bits):
    """`(q, f, q_test, f_test, labels)` of the network."""
    with np.load(DATA) as arrays:
        names = ("q_calib", "f_calib", "q_test", "f_test", "y_test")
        parts = [torch.from_numpy(arrays[f"{bits}_{name}"]) for name in names]
    return *(part.float() for part in parts[:4]), parts[4].long()


def gain(bits, images, draws, target="labels"):
    """Mean and worst gain in top-1 on the test images, percentage points, of so many disjoint draws; with target
    "fp" in agreement with FP, which says more."""
    q, f, q_test, f_test, labels = logits(bits)
    labels = f_test.argmax(1) if target == "fp" else labels
    gains = []
    for start in range(0, images * draws, images):
        rows = slice(start, start + images)
        out = fit_cluster_affine(q[rows], f[rows])(q_test)
        gains.append(100 * ((out.argmax(1) == labels).double() - (q_test.argmax(1) == labels).double()).mean().item())
    return sum(gains) / draws, min(gains)


def null(images, positions, seed, classes=10):
    """Logits `(q, f)`, each (images, positions, classes): `f` is `q` and noise, mostly the same at all positions."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale, each):
        return scale * torch.randn(images, each, classes, generator=generator)

    winner = torch.randint(classes, (images, 1, 1), generator=generator).expand(-1, positions, 1)
    q = noise(1.5, 1) + noise(0.3, positions)
    q = q.scatter_add(2, winner, torch.full((images, positions, 1), 3.0))
    return q, q + noise(1.0, 1) + noise(0.2, positions)


def accepted(images, positions, seed):
    q, f = (part.reshape(-1, 10) for part in null(images, positions, seed))
    owners = torch.arange(images).repeat_interleave(positions) if positions > 1 else None
    return fit_and_score(LogitStore.of(q, f, owners), CATConfig(seed=seed)).evidence.accepted


@pytest.mark.parametrize(("bits", "least"), [("w4a2", 6.0), ("w4a4", 1.0)])
def test_gain_on_real_logits(bits, least):
    assert gain(bits, 256, 4)[1] > least


def test_more_images_gain_more():
    assert gain("w4a2", 64, 8)[0] + 1 < gain("w4a2", 512, 3)[0]


@pytest.mark.parametrize(("images", "positions", "draws"), [(25, 64, 20), (60, 64, 20), (256, 1, 20)])
def test_chance_is_accepted_in_one_fit_of_twenty_at_most(images, positions, draws):
    assert sum(accepted(images, positions, seed) for seed in range(draws)) <= 1


def test_a_rule_that_does_not_ask_for_a_margin_accepts_chance(monkeypatch):
    monkeypatch.setattr(evidence, "LEVEL", 0.5)
    assert sum(accepted(256, 1, seed) for seed in range(20)) > 2


def test_a_stricter_rule_loses_what_is_there(monkeypatch):
    """Evidence of 128 images of the W4A4 network is weak, and right."""
    usual = gain("w4a4", 64, 12)[0]
    monkeypatch.setattr(evidence, "LEVEL", 0.9999)
    assert gain("w4a4", 64, 12)[0] < usual - 0.3


def harm_of_maps(images, positions, share=None):
    """By how much the KL maps alone lower agreement on fresh images where there is nothing to gain."""
    fresh, target = (part.reshape(-1, 10).double() for part in null(4000, 1, 99))
    harms = []
    for seed in range(6):
        q, f = (part.reshape(-1, 10).double() for part in null(images, positions, seed))
        owners = torch.arange(images).repeat_interleave(positions)
        worth = auto.effective_share(q, f, owners if positions > 1 else None)
        shared = families.Shared.of(q, f, CATConfig(num_clusters=1), worth if share is None else share)
        maps = families.fit_maps((families.KL_LOW_RANK,), shared, shared.rows(q, f))
        out = maps[families.KL_LOW_RANK](shared.rows(fresh, target))
        right, still = ((each.argmax(1) == target.argmax(1)).double().mean().item() for each in (fresh, out))
        harms.append(100 * (right - still))
    return sum(harms) / len(harms)


def test_positions_count_as_images_where_all_of_an_image_deviate_alike():
    """A fit that took rows for samples would follow the noise of single images."""
    assert harm_of_maps(40, 64) < 0.6 * harm_of_maps(40, 64, share=1.0)
    assert harm_of_maps(40, 64) == pytest.approx(harm_of_maps(40, 1), abs=0.7)


def test_a_prior_keeps_few_images_from_doing_harm(monkeypatch):
    usual = harm_of_maps(40, 1)
    monkeypatch.setattr(families, "PRIOR", 1.0)
    assert usual + 1 < harm_of_maps(40, 1)


def test_positions_that_have_nothing_in_common_count_as_images():
    """Every position deviates by itself: as good as so many images, of which 2 are too few."""
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(40 * 25, 6, generator=generator)
    f = q + 0.5 * torch.randn(40 * 25, 6, generator=generator)
    share = auto.effective_share(q.double(), f.double(), torch.arange(40).repeat_interleave(25))
    assert share > 0.7
    noise = 2 * torch.randn(40, 1, 6, generator=generator).expand(-1, 25, -1).reshape(-1, 6)
    share = auto.effective_share(q.double(), (q + noise).double(), torch.arange(40).repeat_interleave(25))
    assert share == pytest.approx(1 / 25, rel=0.1)


@pytest.mark.parametrize(
    ("module", "name", "planted", "images", "draws", "loss"),
    [
        (families, "SOFTENING", 0.05, 256, 4, 0.3),
        (families, "SOFTENING", 2.0, 256, 4, 0.3),
        (families, "PRIOR", 80.0, 64, 8, 0.1),
        (weights, "WEIGHT_PRIOR", 160.0, 64, 8, 0.1),
        (weights, "SHARES", (0.25,), 64, 8, 1.0),
    ],
)
def test_constants_that_were_chosen_otherwise_gain_less(monkeypatch, module, name, planted, images, draws, loss):
    usual = gain("w4a2", images, draws, "fp")[0]
    monkeypatch.setattr(module, name, planted)
    assert gain("w4a2", images, draws, "fp")[0] < usual - loss


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_evidence_is_about_what_is_attached(alpha):
    """Every figure of the report at that alpha, computed anew from the outputs of maps fitted without each image."""
    q, f, *_ = logits("w4a4")
    store = LogitStore.of(q[:400], f[:400])
    whole, part = (auto.select(store, CATConfig(alpha=a)) for a in (1.0, alpha))
    if alpha == 0:
        assert not part.evidence.accepted
        assert part.evidence.changed == 0
        assert torch.equal(part.correction(q), q)
        return
    expected = whole.q + alpha * (whole.corrected - whole.q)
    torch.testing.assert_close(part.corrected, expected)
    before, after = whole.q.argmax(1), expected.argmax(1)
    assert part.evidence.changed == pytest.approx(100 * (before != after).double().mean().item())
    target = whole.f.argmax(1)
    won, lost = int(((after == target) & (before != target)).sum()), int(((before == target) & (after != target)).sum())
    assert f"{won} predictions come to agree with FP, and {lost} no longer do" in part.evidence.reason
    scores = fit_and_score(store, CATConfig(alpha=alpha)).scores
    assert scores.agreement_after == pytest.approx(100 * (after == target).double().mean().item())
    torch.testing.assert_close(part.correction(q), q + alpha * (whole.correction(q) - q), rtol=1e-4, atol=1e-4)


class Table(nn.Module):
    """A model whose outputs are looked up."""

    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", table)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.table[x.long().view(-1)] * self.weight


def distinct(images, copies, positions, budget=64):
    """The report of a fit on so many different images, each given several times."""
    generator = torch.Generator().manual_seed(0)
    shape = (images, positions, 6) if positions > 1 else (images, 6)
    f = 3 * torch.randn(*shape, generator=generator)
    q = 0.7 * f + torch.randn(*shape, generator=generator)
    batches = list((torch.arange(images * copies) % images).view(-1, 1).split(5))
    return apply_cat(Table(q), Table(f), batches, config=CATConfig(positions=budget)).report


@pytest.mark.parametrize("budget", [64, 16])
@pytest.mark.parametrize("positions", [1, 64])
@pytest.mark.parametrize(("images", "copies"), [(1, 20), (2, 20), (10, 4)])
def test_different_images_count(images, copies, positions, budget):
    report = distinct(images, copies, positions, budget)
    assert not report.evidence.accepted
    assert report.evidence.reason.startswith(f"{images} different images are too few")
    assert report.images == images * copies
    assert any(f"{images * copies - images} of {images * copies} images repeat" in text for text in report.warnings)


@pytest.mark.parametrize("positions", [1, 64])
def test_repeats_change_nothing(positions):
    assert distinct(40, 3, positions).evidence.images == distinct(40, 1, positions).evidence.images == 40
