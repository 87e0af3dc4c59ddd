import dataclasses

import pytest
import torch

from cat_plugin import CATConfig, ClusterAffine, fit_cluster_affine
from cat_plugin.fitting import auto as module
from cat_plugin.fitting import store
from cat_plugin.fitting.auto import IDENTITY
from cat_plugin.fitting.store import LogitStore
from tests.cat_plugin.helpers import paired_logits

CONFIG = CATConfig(pca_dim=6)


def select(q, f, config):
    return module.select(LogitStore.of(q, f), config)


def prepare(q, f, h=None, max_clusters=16):
    return module._Data.prepare(q, f, h, CONFIG, max_clusters)


def agreement(out, f):
    return 100 * (out.argmax(1) == f.argmax(1)).double().mean().item()


def planted(n_images, n_classes, n_clusters, noise, strength=0.5, seed=0):
    """q, f, and the planted map of f from q's cluster; one class an image stands out in f."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centers = 1.5 * draw(n_clusters, n_classes)
    scale, shift = 1 + 0.2 * strength * draw(n_clusters, n_classes).clamp(-2, 2), strength * draw(n_clusters, n_classes)

    def sample(images):
        winner = torch.randint(n_classes, (images,), generator=generator)
        ids = winner % n_clusters
        f = (centers[ids] + draw(images, n_classes)) * scale[ids] + shift[ids]
        f[torch.arange(images), winner] = f.max(dim=1).values + draw(images).abs() + 0.2
        q = (f - shift[ids]) / scale[ids] + noise * draw(images, n_classes)
        return q, f, q * scale[ids] + shift[ids]

    return sample(n_images), sample(2000)


@pytest.mark.parametrize(
    ("n_images", "n_classes"), [(600, 100), pytest.param(1024, 1000, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("n_clusters", [4, 16])
def test_planted_cluster_map_is_recovered(n_images, n_classes, n_clusters):
    (q, f, _), (fresh, target, perfect) = planted(n_images, n_classes, n_clusters, noise=0.1)
    gain = agreement(perfect, target) - agreement(fresh, target)
    assert gain > 5
    out = fit_cluster_affine(q, f)(fresh)
    assert agreement(out, target) - agreement(fresh, target) >= 0.8 * gain


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_planted_gives_the_identity(noise, seed):
    (q, f, _), (fresh, _, _) = planted(600, 100, 4, noise, strength=0.0, seed=seed)
    selected = select(q, f, CATConfig())
    assert not selected.evidence.accepted
    assert "nothing to gain" in selected.evidence.reason
    assert torch.equal(selected.correction(fresh), fresh)
    assert torch.equal(selected.held_out, selected.q)


def test_correction_is_the_weighted_sum_of_the_maps():
    q, f = paired_logits(300, 12)
    selected = select(q, f, CONFIG)
    q, f = selected.q, selected.f
    data = prepare(q, f, max_clusters=CONFIG.clusters_for(300))
    weights = {candidate.name: candidate.weight for candidate in selected.evidence.candidates}
    rows = torch.arange(len(q))
    maps = data.fit(rows)
    expected = sum(weight * data.apply(maps[name], rows) for name, weight in weights.items())
    out = selected.correction(q)
    # The sum of the weights is a common scale of all logits, the share is what the report tells
    ratio = (out * expected).sum() / expected.square().sum()
    torch.testing.assert_close(out, ratio * expected)
    assert sum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) >= 0


def test_order_of_the_images_does_not_matter():
    q, f = paired_logits(300, 12)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    first, second = fit_cluster_affine(q, f, CONFIG), fit_cluster_affine(q[order], f[order], CONFIG)
    for a, b in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(a, b)


def test_held_out_outputs_do_not_see_their_own_target():
    q, f = paired_logits(200, 6)
    data = prepare(q, f, max_clusters=4)
    outputs = module._cross_fit(data)
    altered = f.clone()
    altered[17] = torch.tensor([50.0, -50.0, 30.0, 0.0, 0.0, 9.0])
    teacher = (altered / data.temperature).softmax(dim=1)
    others = module._cross_fit(dataclasses.replace(data, f=altered, teacher=teacher))
    assert outputs.keys() == others.keys()
    for name, output in outputs.items():
        assert torch.equal(output[17], others[name][17]), name
        if name != IDENTITY:
            assert not torch.equal(output[18], others[name][18]), name


def test_each_family_equals_its_module():
    """The map in terms of whitened components, and the module in terms of logits, are the same function."""
    q, f = paired_logits(300, 12)
    h = torch.cat([f[:, :3] * 2 + 1, torch.randn(300, 4, generator=torch.Generator().manual_seed(3)).double()], dim=1)
    data = prepare(q, f, h)
    rows = torch.arange(300)
    maps = data.fit(rows)
    assert len(maps) == 7 + 3 * (len(data.clusterings) - 1)
    for name, affine_map in maps.items():
        correction = data.correction(affine_map, alpha=1.0)
        features = () if correction.feature_mix is None else (h,)
        assert (correction.feature_mix is not None) == name.endswith("features"), name
        torch.testing.assert_close(correction(q, *features), data.apply(affine_map, rows), msg=name)


def test_only_wanted_families_are_fitted_alike():
    q, f = paired_logits(300, 12)
    data = prepare(q, f)
    rows = torch.arange(300)
    everything = data.fit(rows)
    for name, affine_map in everything.items():
        torch.testing.assert_close(data.fit(rows, {name})[name].shift, affine_map.shift)


def test_features_help_where_logits_do_not():
    q, f = paired_logits(500, 8)
    hidden = 3 * torch.randn(500, 8, generator=torch.Generator().manual_seed(2)).double()
    f = f + hidden
    train, test = slice(0, 400), slice(400, 500)
    plain = fit_cluster_affine(q[train], f[train])
    informed = fit_cluster_affine(q[train], f[train], features=hidden[train])
    gains = [agreement(out, f[test]) for out in (plain(q[test]), informed(q[test], hidden[test]))]
    assert gains[1] > gains[0] + 10


def test_alpha_moves_part_of_the_way():
    q, f = paired_logits(300, 12)
    full, half, none = (fit_cluster_affine(q, f, CATConfig(alpha=alpha)) for alpha in (1.0, 0.5, 0.0))
    assert not torch.equal(full(q), q)
    torch.testing.assert_close(half(q), q + 0.5 * (full(q) - q))
    torch.testing.assert_close(none(q), q)


def test_clusters_are_limited_by_configuration():
    q, f = paired_logits(400, 12)
    names = {candidate.name for candidate in select(q, f, CATConfig(num_clusters=2)).evidence.candidates}
    assert not any("K=" in name for name in names)
    names = {candidate.name for candidate in select(q, f, CATConfig(num_clusters=4)).evidence.candidates}
    assert any("K=4" in name for name in names)


@pytest.mark.parametrize("n_images", [1, 2, 19])
def test_too_few_images_leave_the_model_alone(n_images):
    q, f = paired_logits(n_images, 10)
    selected = select(q, f, CATConfig())
    assert torch.equal(selected.correction(q), q)
    assert f"{n_images} images are too few" in selected.evidence.reason


@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes(classes):
    q, f = paired_logits(100, classes)
    correction = fit_cluster_affine(q, f)
    assert isinstance(correction, ClusterAffine)
    assert torch.isfinite(correction(q)).all()


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_outputs_that_do_not_vary(constant):
    q = torch.full((100, 5), constant).double()
    assert torch.isfinite(fit_cluster_affine(q, paired_logits(100, 5)[1])(q)).all()


def test_streamed_fit_equals_the_one_in_memory(monkeypatch):
    """Least squares are those of all images, in memory and from files, though families are compared on a part."""
    (q, f, _), (fresh, target, _) = planted(900, 12, 4, noise=0.1)
    monkeypatch.setattr(module, "SELECTION_VALUES", 12 * 300)
    monkeypatch.setattr(store, "CHUNK_VALUES", 24 * 170)
    stores = [LogitStore(), LogitStore(memory_values=5000)]
    for one in stores:
        for start in range(0, 900, 64):
            one.append(q[start : start + 64].float(), f[start : start + 64].float())
    memory, files = (module.select(one, CONFIG) for one in stores)
    assert memory.evidence.images == len(memory.q) == 300
    assert memory.images == 900
    for a, b in zip(memory.correction.buffers(), files.correction.buffers(), strict=True):
        assert torch.equal(a, b)
    assert agreement(memory.correction(fresh), target) > agreement(fresh, target) + 3


def test_all_images_count_where_families_are_compared_on_a_part(monkeypatch):
    q, f = paired_logits(900, 6)
    data = prepare(q[:300], f[:300])
    names = {*data.fit(torch.arange(300))}
    streamed = module._fit_all(LogitStore.of(q, f), data, names, module.ALONE)
    monkeypatch.setattr(module._Data, "fit_divergences", lambda self, rows, maps, wanted: divergences)
    divergences = {name: streamed[name] for name in names if name.startswith("KL") and "clusters" not in name}
    ids = {count: (q @ c.weight + c.bias).argmax(dim=1) for count, c in data.clusterings.items()}
    clusterings = {n: dataclasses.replace(c, ids=ids[n]) for n, c in data.clusterings.items()}
    teacher = (f / data.temperature).softmax(dim=1)
    everything = dataclasses.replace(data, q=q, f=f, z=data.basis(q), teacher=teacher, clusterings=clusterings)
    expected = everything.fit(torch.arange(900))
    assert streamed.keys() == expected.keys()
    for name, affine_map in expected.items():
        for part in ("scale", "shift", "mix"):
            torch.testing.assert_close(getattr(streamed[name], part), getattr(affine_map, part), msg=f"{name} {part}")


@pytest.mark.parametrize("copies", [2, 5])
def test_repeated_images_count_once(copies):
    """Copies of an image would be fitted and held out at a time."""
    (q, f, _), (fresh, _, _) = planted(128, 10, 4, noise=0.6, strength=0.0)
    jitter = 1 + 1e-7 * torch.randn(copies * 128, 10, generator=torch.Generator().manual_seed(0)).double()
    once = select(q, f, CATConfig())
    many = select(q.repeat(copies, 1) * jitter, f.repeat(copies, 1), CATConfig())
    assert (once.repeated, many.repeated, many.images) == (0, (copies - 1) * 128, copies * 128)
    assert once.evidence.images == many.evidence.images == 128
    torch.testing.assert_close(many.correction(fresh), once.correction(fresh), atol=1e-3, rtol=1e-3)


def judged(held_out, q, f):
    data = prepare(q, f)
    return module._judge({IDENTITY: q, "other": held_out}, {IDENTITY: 0.0, "other": 1.0}, held_out, data)


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
    assert evidence.changed < module.MIN_CHANGED
    assert not evidence.accepted
    assert "would change 0.00 % of the predictions" in evidence.reason


def test_weights_go_to_what_predicts_held_out_images():
    """With images enough, the weights are those of an unconstrained minimiser that knows nothing of priors."""
    q, f = paired_logits(4000, 6)
    data = prepare(q, f, max_clusters=1)
    noise = torch.randn(4000, 6, generator=torch.Generator().manual_seed(5)).double()
    outputs = {"affine": 0.5 * f + noise, "KL per class": noise.roll(1, 0), "KL low rank": q - noise, IDENTITY: q}
    weights = module._weigh(outputs, data)
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
    data = prepare(q, f, max_clusters=1)
    outputs = {"affine": q, "KL per class": q + 0.01, "KL low rank": q - 0.01, IDENTITY: q + 1}
    weights = module._weigh(outputs, data)
    total = sum(weights.values())
    assert weights["KL per class"] / total == pytest.approx(0.5, abs=0.01)
    assert weights["KL low rank"] / total == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scale_of_the_logits(scale):
    (q, f, _), (fresh, target, _) = planted(600, 12, 4, noise=0.1)
    gain = agreement(fit_cluster_affine(q * scale, f * scale)(fresh * scale), target) - agreement(fresh, target)
    assert gain > 5


@pytest.mark.parametrize("n_images", [20, 40])
def test_any_number_of_clusters_may_be_asked_for(n_images):
    q, f = paired_logits(n_images, 10)
    assert torch.isfinite(fit_cluster_affine(q, f, CATConfig(min_cluster_size=None))(q)).all()


def test_logits_that_partly_agree_are_put_in_order():
    q, f = paired_logits(300, 8)
    q[:, :4], f[:, :4] = 1.0, 2.0
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    first, second = fit_cluster_affine(q, f, CONFIG), fit_cluster_affine(q[order], f[order], CONFIG)
    for a, b in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(a, b)


def test_weights_move_towards_the_identity_as_held_out_images_ask():
    q, f = paired_logits(200, 6)
    data = prepare(q, f)
    for reach, share in ((1.0, 1.0), (2.0, 0.5), (4.0, 0.25), (-1.0, 0.25)):
        outputs = {IDENTITY: q, "other": q + reach * (f - q)}  # the goal lies a part of the way, or behind
        weights = module._temper({IDENTITY: 0.0, "other": 2.0}, outputs, data)
        assert weights == {IDENTITY: pytest.approx(2.0 * (1 - share)), "other": pytest.approx(2.0 * share)}
