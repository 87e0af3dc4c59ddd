import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cat_plugin import CATConfig, CATError, fit_cluster_affine
from cat_plugin.fitting.clustering import fit_clusters
from cat_plugin.metrics import agreement, kl_divergence
from tests.cat_plugin.helpers import held_out_scores, paired_logits
from tests.reference import PaperCAT, lstsq_per_cluster

LOGITS = sorted(Path(os.environ["CAT_LOGITS"]).glob("*.npz")) if "CAT_LOGITS" in os.environ else []


def assert_equals_reference(q, f, fresh, num_clusters, alpha=0.4):
    correction = fit_cluster_affine(q, f, CATConfig.paper(num_clusters, alpha=alpha))
    reference = PaperCAT(num_clusters, pca_dim=50, alpha=alpha).fit(q.double().numpy(), f.double().numpy())
    for part in (q, fresh):
        expected = torch.from_numpy(reference.apply(part.double().numpy()))
        assert (correction(part).double() - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("num_clusters", [1, 8, 20])
@pytest.mark.parametrize("classes", [10, 120])
def test_equals_naive_reference(classes, num_clusters, dtype):
    q, f = paired_logits(600, classes, dtype=dtype)
    fresh, _ = paired_logits(300, classes, seed=1, dtype=dtype)
    assert_equals_reference(q, f, fresh, num_clusters)


@pytest.mark.skipif(not LOGITS, reason="CAT_LOGITS names no folder of *.npz files")
@pytest.mark.parametrize("path", LOGITS, ids=lambda path: path.stem)
def test_equals_naive_reference_on_real_logits(path):
    with np.load(path) as data:
        q, f, fresh = (torch.from_numpy(data[name].astype(np.float64)) for name in ("q_calib", "f_calib", "q_test"))
    for images in (1024, len(q)):
        assert_equals_reference(q[:images], f[:images], fresh, 64)
        # In float32 results agree to about 1e-6 relative, except for images on a border that it cannot resolve.
        config = CATConfig.paper()
        wide, narrow = (
            fit_cluster_affine(q[:images].to(t), f[:images].to(t), config) for t in (q.dtype, torch.float32)
        )
        same = wide.assign(fresh) == narrow.assign(fresh.float())
        assert (~same).sum() <= len(fresh) / 1000
        torch.testing.assert_close(narrow(fresh.float())[same].double(), wide(fresh)[same], atol=1e-5, rtol=1e-6)


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


def test_full_correction_is_least_squares():
    q, f = paired_logits(500, 10)
    config = CATConfig.paper(6, alpha=1.0)
    correction = fit_cluster_affine(q, f, config)
    ids = fit_clusters(q, 6, config).ids
    assert torch.equal(correction.assign(q), ids)
    gamma, beta = lstsq_per_cluster(q.numpy(), f.numpy(), ids.numpy(), 6)
    torch.testing.assert_close(correction.scale, torch.from_numpy(gamma))
    torch.testing.assert_close(correction.shift, torch.from_numpy(beta))
    # Least squares: never further from f than the identity
    assert ((correction(q) - f) ** 2).mean() <= ((q - f) ** 2).mean()


def test_planted_map_is_recovered():
    q, _ = paired_logits(500, 10, noise=0.0)
    config = CATConfig.paper(5, alpha=1.0)
    ids = fit_clusters(q, 5, config).ids
    scale, shift = 1 + torch.rand(5, 10, dtype=torch.float64), torch.randn(5, 10, dtype=torch.float64)
    f = scale[ids] * q + shift[ids]
    torch.testing.assert_close(fit_cluster_affine(q, f, config)(q), f)


def test_alpha_interpolates():
    q, f = paired_logits(500, 10)
    none, some, full = (fit_cluster_affine(q, f, CATConfig.paper(6, alpha=alpha))(q) for alpha in (0.0, 0.3, 1.0))
    assert torch.equal(none, q)
    torch.testing.assert_close(some, q + 0.3 * (full - q))


def test_identical_outputs_give_the_identity():
    q, _ = paired_logits(300, 10)
    torch.testing.assert_close(fit_cluster_affine(q, q, CATConfig.paper(4, alpha=1.0))(q), q)


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


def test_repeated_images_and_one_image():
    q, f = paired_logits(3, 10)
    correction = fit_cluster_affine(q.repeat(20, 1), f.repeat(20, 1), CATConfig.paper(8, alpha=1.0))
    torch.testing.assert_close(correction(q), f)
    assert correction.num_clusters == 8
    assert fit_cluster_affine(q[:1], f[:1]).num_clusters == 1


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


def test_held_out_scores_equal_five_separate_fits():
    q, f = paired_logits(203, 10, dtype=torch.float32)
    config = CATConfig.paper(4, seed=7)
    order = torch.randperm(203, generator=torch.Generator().manual_seed(7))
    parts = []
    for fold in range(5):
        train = torch.cat([order[other::5] for other in range(5) if other != fold]).sort().values
        correction = fit_cluster_affine(q[train], f[train], config)
        parts.append((f[order[fold::5]], correction(q[order[fold::5]])))
    targets, out = (torch.cat(part) for part in zip(*parts, strict=True))
    scores = held_out_scores(q, f, config)
    assert scores.agreement_before == agreement(f, q)
    assert scores.kl_before == kl_divergence(f, q)
    assert scores.agreement_after == pytest.approx(agreement(targets, out))
    assert scores.kl_after == pytest.approx(kl_divergence(targets, out))


@pytest.mark.parametrize("n_images", [2, 3, 7])
def test_held_out_scores_of_few_images(n_images):
    q, f = paired_logits(n_images, 10)
    scores = held_out_scores(q, f, CATConfig.paper(num_clusters=n_images))
    assert 0 <= scores.agreement_after <= 100


def test_one_image_cannot_be_held_out():
    assert held_out_scores(*paired_logits(1, 10)) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fit_on_a_gpu_equals_the_cpu():
    q, f = paired_logits(300, 10)
    correction = fit_cluster_affine(q.cuda(), f.cuda())
    assert correction.scale.is_cuda
    torch.testing.assert_close(correction(q.cuda()).cpu(), fit_cluster_affine(q, f)(q))
