import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar

from cat_plugin import CATConfig
from cat_plugin.fitting.families import AFFINE, CLUSTERED, IDENTITY, KL_AFFINE, KL_LOW_RANK, SHARED, Shared
from cat_plugin.fitting.weights import FEW_SAMPLES, WEIGHT_PRIOR, Sample, cross_fit, mixed, temper, weigh
from tests.cat_plugin.helpers import paired_logits


def sample_of(q, f, clusters=1, owners=None, share=1.0):
    shared = Shared.of(q, f, CATConfig(pca_dim=6, num_clusters=clusters), share)
    return Sample(shared.rows(q, f), owners, shared, seed=0)


@pytest.mark.parametrize("positions", [1, 4])
def test_held_out_outputs_do_not_see_their_own_target(positions):
    """Nor those of other positions of the image."""
    q, f = paired_logits(200, 6)
    owners = None if positions == 1 else torch.arange(200) // positions
    sample = sample_of(q, f, 4, owners)
    altered = f.clone()
    altered[17] = torch.tensor([50.0, -50.0, 30.0, 0.0, 0.0, 9.0])
    _, others = cross_fit(Sample(sample.rows._replace(f=altered), owners, sample.shared, sample.seed))
    _, outputs = cross_fit(sample)
    assert tuple(outputs) == tuple(others) == SHARED + CLUSTERED
    folds = sample.folds()
    same = (torch.arange(200) == 17) if owners is None else (owners == owners[17])
    assert (folds[same] == folds[17]).all() and same.sum() == positions
    for family, output in outputs.items():
        assert torch.equal(output[folds == folds[17]], others[family][folds == folds[17]]), family
        if family != IDENTITY:
            assert not torch.equal(output[folds != folds[17]], others[family][folds != folds[17]]), family


@pytest.mark.parametrize(
    ("rows", "positions", "share", "folds"),
    [
        (FEW_SAMPLES, 1, 1.0, 10),
        (FEW_SAMPLES + 1, 1, 1.0, 5),
        (2 * FEW_SAMPLES, 1, 0.5, 10),
        (2 * FEW_SAMPLES, 4, 1.0, 5),
    ],
)
def test_few_rows_are_cut_into_more_folds(rows, positions, share, folds):
    q, f = paired_logits(rows, 3)
    owners = None if positions == 1 else torch.arange(rows) // positions
    found = sample_of(q, f, owners=owners, share=share).folds()
    assert found.unique().tolist() == list(range(folds))
    assert torch.bincount(found).max() - torch.bincount(found).min() <= positions


def naive_weights(outputs, sample, trusted):
    """By the objective, row by row, minimised from finite differences."""
    centred = [(part - part.mean(dim=1, keepdim=True)).double().numpy() for part in outputs.values()]
    teacher = [np.exp(row) / np.exp(row).sum() for row in sample.rows.f.numpy()]

    def cross_entropy(logits):
        rows = zip(logits, teacher, strict=True)
        return np.mean([math.log(np.exp(row).sum()) - target @ row for row, target in rows])

    mean = sum(weight * part for weight, part in zip(trusted, centred, strict=True))
    scale = minimize_scalar(lambda scale: cross_entropy(scale * mean), bounds=(0, 20), method="bounded").x
    variance = curvature = 0.0
    for part in centred:
        slopes, curvatures = [], []
        for row, values, target in zip(scale * mean, part, teacher, strict=True):
            predicted = np.exp(row) / np.exp(row).sum()
            slopes.append(predicted @ values - target @ values)
            curvatures.append(predicted @ values**2 - (predicted @ values) ** 2)
        variance, curvature = variance + np.var(slopes, ddof=1), curvature + np.mean(curvatures)
    penalty = WEIGHT_PRIOR * min(variance / curvature, 1) / (sample.shared.share * len(teacher))

    def objective(weights):
        total = sum(weight * part for weight, part in zip(weights, centred, strict=True))
        return cross_entropy(total) + penalty * ((weights / scale - trusted) ** 2).sum()

    bounds = [(0, None)] * len(centred)
    return minimize(objective, scale * np.array(trusted), bounds=bounds, method="L-BFGS-B", tol=1e-12).x, penalty


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_weights_equal_a_naive_minimisation(share):
    q, f = paired_logits(80, 6)
    sample = sample_of(q, f, share=share)
    noise = torch.randn(80, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    outputs = {AFFINE: 0.5 * f + noise, KL_AFFINE: q + noise, KL_LOW_RANK: 0.8 * f - noise, IDENTITY: q}
    expected, penalty = naive_weights(outputs, sample, [0, 0.5, 0.5, 0])
    assert penalty > 0.005, "else nothing is told of it"
    found = weigh(outputs, sample)
    assert list(found) == list(outputs)
    torch.testing.assert_close(torch.tensor(list(found.values())), torch.tensor(expected).float(), atol=2e-3, rtol=0)


def test_weights_go_to_what_predicts_held_out_images():
    """With images enough, the weights are those of an unconstrained minimiser that knows nothing of priors."""
    q, f = paired_logits(4000, 6)
    noise = torch.randn(4000, 6, generator=torch.Generator().manual_seed(5)).double()
    outputs = {AFFINE: 0.5 * f + noise, KL_AFFINE: noise.roll(1, 0), KL_LOW_RANK: q - noise, IDENTITY: q}
    weights = weigh(outputs, sample_of(q, f))
    free = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure():
        optimizer.zero_grad()
        out = sum(weight**2 * output for weight, output in zip(free + 0.5, outputs.values(), strict=True))
        loss = torch.nn.functional.cross_entropy(out, f.softmax(dim=1))
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (free.detach() + 0.5) ** 2
    torch.testing.assert_close(torch.tensor(list(weights.values())).double(), expected, atol=0.05, rtol=0)


def test_few_images_keep_the_trusted_families():
    q, f = paired_logits(30, 6)
    outputs = {AFFINE: q, KL_AFFINE: q + 0.01, KL_LOW_RANK: q - 0.01, IDENTITY: q + 1}
    weights = weigh(outputs, sample_of(q, f))
    total = sum(weights.values())
    assert weights[KL_AFFINE] / total == pytest.approx(0.5, abs=0.01)
    assert weights[KL_LOW_RANK] / total == pytest.approx(0.5, abs=0.01)


def test_weights_move_towards_the_identity_as_held_out_images_ask():
    q, f = paired_logits(200, 6)
    sample = sample_of(q, f)
    for reach, share in ((1.0, 1.0), (2.0, 0.5), (4.0, 0.25), (-1.0, 0.25)):
        outputs = {IDENTITY: q, AFFINE: q + reach * (f - q)}  # the goal lies a part of the way, or behind
        weights = temper({IDENTITY: 0.0, AFFINE: 2.0}, outputs, sample)
        assert weights == {IDENTITY: pytest.approx(2.0 * (1 - share)), AFFINE: pytest.approx(2.0 * share)}


def test_scale_does_not_hold_weights_back():
    """The map has the right direction and twice the length: all the way, since the scale does not matter."""
    _, f = paired_logits(300, 6)
    q = f / 2 + 0.8 * torch.randn(300, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = temper({IDENTITY: 0.0, AFFINE: 1.0}, {IDENTITY: q, AFFINE: 2 * f}, sample_of(q, f))
    assert weights == {IDENTITY: pytest.approx(0.0), AFFINE: pytest.approx(1.0)}


def test_mixture_is_the_weighted_sum():
    outputs = {IDENTITY: torch.ones(2, 3), AFFINE: torch.arange(6.0).reshape(2, 3)}
    found = mixed({AFFINE: 0.5, IDENTITY: 2.0}, outputs)
    assert found.dtype == torch.float64
    assert found.tolist() == [[2.0, 2.5, 3.0], [3.5, 4.0, 4.5]]
