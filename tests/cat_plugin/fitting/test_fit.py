import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cat_plugin import CATConfig, CATError, fit_cluster_affine
from cat_plugin.fitting import auto
from cat_plugin.fitting.fit import fit_and_score
from cat_plugin.fitting.scores import HeldOutScores
from cat_plugin.fitting.store import LogitStore
from tests.cat_plugin.helpers import held_out_scores, paired_logits

LOGITS = sorted(Path(os.environ["CAT_LOGITS"]).glob("*.npz")) if "CAT_LOGITS" in os.environ else []


@pytest.mark.skipif(not LOGITS, reason="CAT_LOGITS names no folder of *.npz files")
@pytest.mark.parametrize("config", [CATConfig.paper(), CATConfig()], ids=["paper", "auto"])
@pytest.mark.parametrize("path", LOGITS, ids=lambda path: path.stem)
def test_half_keeps_top1_on_real_logits(path, config):
    with np.load(path) as data:
        q, f = (torch.from_numpy(data[name][1024:2048].astype(np.float32)) for name in ("q_calib", "f_calib"))
        fresh, labels = torch.from_numpy(data["q_test"].astype(np.float32)), torch.from_numpy(data["y_test"])
    correction = fit_cluster_affine(q, f, config)
    wide, size = correction(fresh).argmax(dim=1) == labels, correction.num_bytes
    narrow = correction.half()(fresh).argmax(dim=1) == labels
    assert correction.num_bytes == size / 2
    assert 100 * abs(narrow.double().mean() - wide.double().mean()) <= 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    q, f = paired_logits(300, 10, dtype=dtype)
    wide = fit_cluster_affine(q.double(), f.double())
    correction = fit_cluster_affine(q, f)
    assert correction.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert correction(q).dtype == dtype
    torch.testing.assert_close(correction.scale.double(), wide.scale)


def test_inputs_are_not_changed():
    q, f = paired_logits(300, 10)
    q.requires_grad_()
    copies = q.detach().clone(), f.clone()
    correction = fit_cluster_affine(q, f)
    assert torch.equal(q, copies[0])
    assert torch.equal(f, copies[1])
    assert not any(buffer.requires_grad for buffer in correction.buffers())


def test_same_seed_same_result_and_random_state_untouched():
    q, f = paired_logits(300, 60)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (fit_cluster_affine(q, f, CATConfig(seed=5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))
    assert held_out_scores(q, f) == held_out_scores(q, f)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()


Q = torch.ones(3, 4)
HOLED = torch.tensor([[float("nan")] * 4, [1.0, float("inf"), 1.0, 1.0], [1.0] * 4])


@pytest.mark.parametrize(
    ("q", "f", "message"),
    [
        (Q, torch.ones(3, 5), r"q has shape \(3, 4\) and .* f has shape \(3, 5\)"),
        (Q[0], Q[0], r"q has shape \(4,\)"),
        (Q[:0], Q[:0], r"q has shape \(0, 4\) .* at least one image"),
        (Q.int(), Q.int(), "dtype torch.int32"),
        (Q.numpy(), Q, "q is a ndarray; expected a torch.Tensor"),
        (HOLED, Q, "q gave 5 NaN or infinite logits, in 2 of 3 images"),
        (Q, HOLED, "f gave 5 NaN or infinite logits"),
        (Q, Q, "n_images=3 should be >= num_clusters=64; lower num_clusters or give more images"),
    ],
)
def test_errors(q, f, message):
    with pytest.raises(CATError, match=message):
        fit_cluster_affine(q, f, CATConfig.paper())


@pytest.mark.parametrize("config", [CATConfig(), CATConfig.paper(4), CATConfig(output_kind="softmax")])
def test_a_single_logit_is_no_class(config):
    q, f = paired_logits(300, 1)
    with pytest.raises(CATError, match=r"\(300, 1\), one logit an image: .* second of two classes; give both"):
        fit_cluster_affine(q, f, config)


@pytest.mark.parametrize("output_kind", ["sigmoid", "value"])
def test_a_single_label_or_value_is_corrected(output_kind):
    q = paired_logits(300, 1)[0]
    corrected = fit_cluster_affine(q, 2 * q + 1, CATConfig(output_kind=output_kind))(q)
    assert (corrected - (2 * q + 1)).norm() < 0.1 * (q + 1).norm()


def test_two_classes_of_one_logit_are_corrected():
    q = torch.nn.functional.pad(paired_logits(300, 1)[0], (1, 0))
    corrected = fit_cluster_affine(q, 2 * q + torch.tensor([0.0, 1.0]))(q)
    z = corrected.diff(dim=1) - 2 * q[:, 1:]
    assert (z - 1).abs().mean() < 0.1


@pytest.mark.parametrize("config", [CATConfig(), CATConfig.paper(4)], ids=["auto", "paper"])
def test_scores_are_those_of_the_held_out_outputs(config):
    q, f = paired_logits(203, 10, dtype=torch.float32)
    fit = fit_and_score(LogitStore.of(q, f), config)
    assert fit.scores == HeldOutScores.of(fit.f, fit.q, fit.out)
    assert (fit.images, fit.positions, fit.repeated) == (203, None, 0)
    fitted = fit_cluster_affine(q, f, config)
    assert all(torch.equal(a, b) for a, b in zip(fit.correction.buffers(), fitted.buffers(), strict=True))
    assert (fit.evidence is None) == (config.mode == "paper")


@pytest.mark.parametrize("config", [CATConfig(), CATConfig.paper(4)], ids=["auto", "paper"])
def test_repeated_images_and_positions_are_counted(config):
    q, f = paired_logits(60, 10, dtype=torch.float32)
    copies = torch.cat([torch.arange(60), torch.arange(9)])
    fit = fit_and_score(LogitStore.of(q[copies], f[copies]), config)
    assert (fit.images, fit.positions, fit.repeated) == (69, None, 9)
    dense = fit_and_score(LogitStore.of(q, f, torch.arange(30).repeat_interleave(2)), config)
    assert (dense.images, dense.positions, dense.repeated) == (30, 60, 0)


@pytest.mark.parametrize(
    ("n_images", "config"),
    [(auto.MIN_IMAGES - 1, CATConfig()), (1, CATConfig.paper(1))],
    ids=["auto", "paper"],
)
def test_no_scores_where_nothing_can_be_held_out(n_images, config):
    q, f = paired_logits(n_images, 10)
    fit = fit_and_score(LogitStore.of(q, f), config)
    assert fit.scores is None and fit.out is None and fit.images == n_images
    more = paired_logits(n_images + 1, 10)
    assert held_out_scores(*more, config) is not None


@pytest.mark.parametrize("n_images", [2, 3, 7])
def test_held_out_scores_of_few_images(n_images):
    q, f = paired_logits(n_images, 10)
    scores = held_out_scores(q, f, CATConfig.paper(num_clusters=n_images))
    assert 0 <= scores.agreement_after <= 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fit_on_a_gpu_equals_the_cpu():
    q, f = paired_logits(300, 10)
    correction = fit_cluster_affine(q.cuda(), f.cuda())
    assert correction.scale.is_cuda
    torch.testing.assert_close(correction(q.cuda()).cpu(), fit_cluster_affine(q, f)(q))
