"""Each loss against a formula written out for one image at a time, and what a fit makes of each criterion."""

import dataclasses
import math
import re

import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from cat_plugin import CATConfig, fit_cluster_affine
from cat_plugin.fitting import auto as module
from cat_plugin.fitting.auto import IDENTITY
from cat_plugin.fitting.criteria import CRITERIA
from cat_plugin.metrics import agreement, kl_divergence
from tests.cat_plugin.helpers import paired_logits

TEMPERATURE = 2.5


def falls(name, q, out, f):
    """(N,) by how much the loss of `out` is below that of `q`."""
    criterion = CRITERIA[name]
    target = criterion.target(f, TEMPERATURE)
    return criterion.loss(q, target, TEMPERATURE) - criterion.loss(out, target, TEMPERATURE)


def images():
    q, f = paired_logits(80, 6)
    return q, q + 0.6 * (f - q), f


def test_kl_is_that_of_the_report():
    q, out, f = images()
    expected = kl_divergence(f, q) - kl_divergence(f, out)
    assert expected > 0.01
    assert falls("kl", q, out, f).mean().item() == pytest.approx(expected)


def test_agreement_is_that_of_the_report_in_percentage_points():
    q, out, f = images()
    expected = agreement(f, out) - agreement(f, q)
    assert expected > 1
    assert falls("agreement", q, out, f).mean().item() == pytest.approx(expected)


def test_squared_error_leaves_out_what_classes_have_in_common():
    q, out, f = images()
    expected = []
    for before, after, target in zip(q.numpy(), out.numpy(), f.numpy(), strict=True):
        errors = [((row - row.mean() - target + target.mean()) ** 2).sum() / 6 for row in (before, after)]
        expected.append(errors[0] - errors[1])
    found = falls("squared_error", q, out, f)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(falls("squared_error", q + 3, out - 2, f + 1), found)


@pytest.mark.parametrize("name", ["softened_kl", "none"])
def test_softened_kl_is_at_the_scale_that_suits_each_side(name):
    q, out, f = images()
    teacher = softmax(f.numpy() / TEMPERATURE, axis=1)

    def entropies(logits, scale):
        return -(teacher * log_softmax(scale * logits.numpy(), axis=1)).sum(axis=1)

    def smallest(logits):
        found = minimize_scalar(lambda log: entropies(logits, math.exp(log)).mean(), bracket=(-2, 0), tol=1e-10)
        return entropies(logits, math.exp(found.x))

    found = falls(name, q, out, f)
    torch.testing.assert_close(found, torch.from_numpy(smallest(q) - smallest(out)), atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(falls(name, q, 7 * out, f), found, atol=1e-3, rtol=1e-2)


def prepare(q, f, criterion, max_clusters=1):
    return module._Data.prepare(q, f, None, CATConfig(criterion=criterion), max_clusters)


def judged(criterion, out, q, f):
    outputs, weights = {IDENTITY: q, "other": out}, {IDENTITY: 0.0, "other": 1.0}
    return module._judge(outputs, weights, out, prepare(q, f, criterion))


@pytest.mark.parametrize(
    ("criterion", "said"),
    [
        ("softened_kl", r"on held-out images, softened KL falls by 0\.\d{4} \+- 0\.\d{4} nats; \d+ predictions"),
        ("kl", r"on held-out images, KL falls by 0\.\d{4} \+- 0\.\d{4} nats; \d+ predictions"),
        ("squared_error", r"on held-out images, squared error of the logits falls by \d\.\d{4} \+- 0\.\d{4}; \d+ pre"),
        (
            "agreement",
            r"on held-out images, disagreement with FP falls by \d+\.\d{4} \+- \d\.\d{4} percentage points; ",
        ),
        ("none", r"on held-out images, softened KL falls by 0\.\d{4} \+- 0\.\d{4} nats; \d+ predictions"),
    ],
)
def test_evidence_is_in_the_terms_of_the_criterion(criterion, said):
    q, out, f = images()
    evidence = judged(criterion, out, q, f)
    assert evidence.accepted
    assert re.match(said, evidence.reason), evidence.reason
    assert evidence.kl_gain == judged("softened_kl", out, q, f).kl_gain, "in nats, whatever the criterion"


def test_figures_of_the_reason():
    q, out, f = images()
    right = [(logits.argmax(1) == f.argmax(1)).double() for logits in (q, out)]
    fall, error = 100 * (right[1] - right[0]).mean(), 100 * (right[1] - right[0]).std() / math.sqrt(80)
    said = f"disagreement with FP falls by {fall:.4f} +- {error:.4f} percentage points"
    assert said in judged("agreement", out, q, f).reason


def wild():
    """`out` is right, but for one image of fifty, which is as wrong as can be."""
    q, f = paired_logits(400, 6)
    out = f.clone()
    out[::50] *= -20
    return q, out, f


def rescaled():
    """`out` has the right scale, and a direction that is a little worse."""
    _, f = paired_logits(400, 6)
    noise = torch.randn(2, 400, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 0.3 * (f + 0.5 * noise[0]), f + 0.8 * noise[1], f


@pytest.mark.parametrize(("made", "content"), [(wild, {"agreement"}), (rescaled, {"kl", "squared_error"})])
def test_criteria_disagree(made, content):
    """Plain KL and squared error reward mere rescaling, agreement does not see how wrong an output is."""
    reasons = {name: judged(name, *(made()[i] for i in (1, 0, 2))).reason for name in CRITERIA}
    assert {name for name, reason in reasons.items() if "does not fall" not in reason} == content


def test_without_a_criterion_everything_is_accepted():
    q, out, f = wild()
    assert judged("agreement", out, q, f).accepted and not judged("kl", out, q, f).accepted
    evidence = judged("none", out, q, f)
    assert evidence.accepted
    assert evidence.reason.startswith("no evidence was demanded: on held-out images, softened KL does not fall, it ri")
    q, f = paired_logits(200, 6, noise=0.0)
    assert torch.equal(fit_cluster_affine(f + 0.3, f, CATConfig())(q.float()), q.float())
    assert not torch.equal(fit_cluster_affine(f + 0.3, f, CATConfig(criterion="none"))(q.float()), q.float())
    few = fit_cluster_affine(q[:19], f[:19], CATConfig(criterion="none"))
    assert torch.equal(few(q), q), "nothing can be fitted"


@pytest.mark.parametrize(
    ("criterion", "share"),
    [("softened_kl", 1.0), ("none", 1.0), ("agreement", 1.0), ("kl", 0.5), ("squared_error", 0.25)],
)
def test_criterion_says_how_far_to_go(criterion, share):
    """The map has the right direction and twice the length: all the way where the scale does not matter."""
    _, f = paired_logits(300, 6)
    q = f / 2 + 0.8 * torch.randn(300, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = {IDENTITY: q, "other": 2 * f}
    weights = module._temper({IDENTITY: 0.0, "other": 1.0}, outputs, prepare(q, f, criterion))
    assert weights == {IDENTITY: pytest.approx(1 - share), "other": pytest.approx(share)}


def test_criterion_chooses_the_number_of_clusters():
    q, f = paired_logits(400, 6)
    data = prepare(q, f, "softened_kl", max_clusters=32)
    real = data.criterion

    def kept(criterion):
        return {name for name in module._cross_fit(dataclasses.replace(data, criterion=criterion)) if "K=" in name}

    reverse = dataclasses.replace(real, loss=lambda *given: -real.loss(*given))
    assert kept(real) and kept(reverse) and not kept(real) & kept(reverse)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_makes_a_correction(criterion):
    q, f = paired_logits(600, 8)
    train, test = slice(0, 400), slice(400, 600)
    out = fit_cluster_affine(q[train], f[train], CATConfig(criterion=criterion))(q[test])
    assert agreement(f[test], out) > agreement(f[test], q[test]) + 1


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_class_has_no_scale_to_find(criterion):
    f = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    correction = fit_cluster_affine(f / 2, f, CATConfig(criterion=criterion))
    assert correction(f).abs().max() <= 10 * f.abs().max()
