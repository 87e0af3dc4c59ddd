import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from cat_plugin import CATConfig
from cat_plugin.fitting.evidence import MIN_CHANGED, judge
from cat_plugin.fitting.families import AFFINE, IDENTITY, Shared
from cat_plugin.fitting.weights import Sample
from tests.cat_plugin.helpers import paired_logits


def judged(held_out, q, f, owners=None):
    shared = Shared.of(q, f, CATConfig(pca_dim=6))
    outputs, weights = {IDENTITY: q, AFFINE: held_out}, {IDENTITY: 0.0, AFFINE: 1.0}
    return judge(outputs, weights, held_out, Sample(shared.rows(q, f), owners, shared, seed=0))


def naive_falls(out, q, f):
    """(N,) fall of the divergence of predictions softened by half FP's spread, each side at its best scale."""
    teacher = softmax(f / (0.5 * np.mean([np.std(row, ddof=1) for row in f])), axis=1)

    def entropies(logits):
        def at(log_scale):
            return -(teacher * log_softmax(math.exp(log_scale) * logits, axis=1)).sum(axis=1)

        return at(minimize_scalar(lambda log: at(log).mean(), bracket=(-2, 0), tol=1e-10).x)

    return entropies(q) - entropies(out)


def test_figures_are_those_of_naive_formulas():
    q, f = paired_logits(80, 6, noise=2.0)
    out = q + 0.4 * (f - q) + torch.randn(80, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    evidence = judged(out, q, f)
    falls = naive_falls(out.numpy(), q.numpy(), f.numpy())
    assert evidence.images == 80
    assert evidence.kl_gain == pytest.approx(falls.mean(), abs=1e-3)
    assert evidence.kl_gain_error == pytest.approx(falls.std(ddof=1) / math.sqrt(80), rel=0.02)
    classes = [[int(row.argmax()) for row in logits] for logits in (f, q, out)]
    won = sum(target == after != before for target, before, after in zip(*classes, strict=True))
    lost = sum(target == before != after for target, before, after in zip(*classes, strict=True))
    changed = sum(before != after for _, before, after in zip(*classes, strict=True))
    assert evidence.accepted and 0 < lost < won and won + lost < changed
    assert evidence.changed == pytest.approx(100 * changed / 80)
    assert evidence.reason == (
        f"on held-out images, softened KL falls by {evidence.kl_gain:.4f} +- {evidence.kl_gain_error:.4f} nats; "
        f"{won} predictions come to agree with FP, and {lost} no longer do"
    )


def test_candidates_are_the_families_with_their_share():
    q, f = paired_logits(80, 6)
    shared = Shared.of(q, f, CATConfig())
    sample = Sample(shared.rows(q, f), None, shared, seed=0)
    outputs = {IDENTITY: q.float(), AFFINE: (q + 0.6 * (f - q)).float()}
    identity, affine = judge(outputs, {IDENTITY: 0.5, AFFINE: 1.5}, q, sample).candidates
    assert (identity.name, identity.weight, affine.name, affine.weight) == ("identity", 0.25, "affine", 0.75)
    assert identity.kl_gain == pytest.approx(0, abs=1e-6)
    assert affine.kl_gain == pytest.approx(judged(q + 0.6 * (f - q), q, f).kl_gain, abs=1e-6)
    assert [each.weight for each in judge(outputs, {IDENTITY: 0.0, AFFINE: 0.0}, q, sample).candidates] == [0.0, 0.0]


def test_evidence_against_a_correction():
    q, f = paired_logits(200, 6)
    closer, wrong = q + 0.5 * (f - q), f.roll(1, dims=1)
    assert judged(closer, q, f).accepted
    worse = judged(wrong, q, f)
    assert not worse.accepted
    assert worse.kl_gain < 0
    assert "nothing to gain" in worse.reason
    assert "softened KL does not fall" in worse.reason


def test_agreement_that_falls_speaks_against_a_correction():
    """All logits come nearer to FP except for the two largest, which change places in a tenth of the images."""
    _, f = paired_logits(400, 6)
    q, out = 5 * (f / 5).tanh(), f.clone()
    top = f.topk(2, dim=1).indices
    rows = torch.arange(0, 400, 10)
    middle = (f[rows, top[rows, 0]] + f[rows, top[rows, 1]]) / 2
    out[rows, top[rows, 0]], out[rows, top[rows, 1]] = middle - 1e-3, middle + 1e-3
    evidence = judged(out, q, f)
    assert evidence.kl_gain > 0
    assert not evidence.accepted
    assert "no longer do" in evidence.reason


def test_change_that_is_not_worth_having():
    q, f = paired_logits(200, 6)
    evidence = judged(q * 1.1 + 0.01 * (f - q), q, f)
    assert evidence.changed < MIN_CHANGED
    assert not evidence.accepted
    assert "would change 0.00 % of the predictions" in evidence.reason


@pytest.mark.parametrize(("images", "worth"), [(3, False), (5, True)])
def test_one_prediction_of_a_hundred_has_to_change(images, worth):
    """Of 400: FP's classes, but for so many images of which the low-bit model has the second best."""
    _, f = paired_logits(400, 6)
    q, top = 4 * (f / 4).tanh(), f.topk(2, dim=1).indices
    rows = torch.arange(images)
    q[rows, top[rows, 1]] = q[rows].max(dim=1).values + 1e-3
    evidence = judged(f, q, f)
    assert evidence.changed == pytest.approx(images / 4)
    assert evidence.accepted == worth


def wild():
    """`out` is right, but for one image of fifty, which is as wrong as can be."""
    q, f = paired_logits(400, 6)
    out = f.clone()
    out[::50] *= -20
    return out, q, f


def rescaled():
    """`out` has the right scale, and a direction that is a little worse."""
    _, f = paired_logits(400, 6)
    noise = torch.randn(2, 400, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return f + 0.8 * noise[1], 0.3 * (f + 0.5 * noise[0]), f


@pytest.mark.parametrize("made", [wild, rescaled])
def test_neither_a_few_wild_images_nor_mere_rescaling_is_a_gain(made):
    assert "does not fall" in judged(*made()).reason


def test_positions_count_for_as_much_as_their_images():
    """One image more loses its agreement than wins it: chance, and no less so where each has twenty positions."""
    _, f = paired_logits(200, 6)
    second = f.topk(2, dim=1).indices[:, 1]

    def swapped(logits, rows):
        logits = logits.clone()
        logits[rows, second[rows]] = logits[rows].max(dim=1).values + 1e-3
        return logits

    q, out = swapped(4 * (f / 4).tanh(), torch.arange(3)), swapped(f, torch.arange(10, 14))
    plain = judged(out, q, f)
    owners = torch.arange(200).repeat_interleave(20)
    many = judged(out[owners], q[owners], f[owners], owners)
    assert plain.accepted and many.accepted
    assert many.images == plain.images == 200
    assert (many.kl_gain, many.kl_gain_error) == pytest.approx((plain.kl_gain, plain.kl_gain_error))
    assert "60 predictions come to agree with FP, and 80 no longer do" in many.reason
    assert not judged(out[owners], q[owners], f[owners]).accepted, "as if they were images"
