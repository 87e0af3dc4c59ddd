import copy
import pickle

import pytest
import torch
from torch import nn

from cat_plugin import CATConfig, CATError, CATWrapper, ClusterAffine, apply_cat, fit_cluster_affine
from cat_plugin.correction.hook import find_hooks
from cat_plugin.fitting.fit import cross_fitted
from cat_plugin.fitting.layer import fit_layer
from cat_plugin.fitting.scores import ErrorScores
from cat_plugin.fitting.store import LogitStore
from cat_plugin.running.positions import to_rows
from tests.cat_plugin.helpers import images, state_of


class Scaled(nn.Module):
    """A layer whose channels are off by a scale and an offset, which a correction can undo."""

    def __init__(self, layer, scale, shift):
        super().__init__()
        self.layer = layer
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x):
        return self.layer(x) * self.scale + self.shift


class Net(nn.Module):
    """Images (N, 3, 6, 6) through a convolution, a rectifier that works in place, and pooling."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.head(self.act(self.body(x)).mean(dim=(2, 3)))


def pixels(n_images=200, seed=0):
    return images(n_images * 18, seed).reshape(n_images, 3, 6, 6)


def net_pair(spread=0.5):
    """`(quantized, fp)`: the body of the first is distorted channel by channel."""
    fp = Net().eval()
    quantized = copy.deepcopy(fp)
    generator = torch.Generator().manual_seed(1)
    scale, shift = (spread * torch.randn(1, 8, 1, 1, generator=generator) for _ in range(2))
    quantized.body = Scaled(quantized.body, scale.exp(), shift).eval()
    return quantized, fp


@pytest.mark.parametrize("box", [None, lambda out: (out, out[:, :2]), lambda out: {"a": out, "b": out}])
def test_planted_distortion_is_undone(box):
    quantized, fp = net_pair()
    where = None
    if box is not None:
        where = 0 if isinstance(box(torch.zeros(1, 2)), tuple) else "a"
        for model in (quantized, fp):
            model.body.register_forward_hook(lambda module, args, out: box(out))
            model.act.register_forward_pre_hook(lambda module, args: args[0][where])
    x, fresh = pixels(), pixels(20, seed=3)
    labels = fp(x).argmax(dim=1)
    before = state_of(quantized, fp)
    with torch.no_grad():
        plain = quantized(fresh)
        cat_model = apply_cat(quantized, fp, x, layer="body", output=where, eval_loader=[(x, labels)], batch_size=50)
        corrected = quantized(fresh)
        torch.testing.assert_close(corrected, fp(fresh), rtol=1e-3, atol=1e-4)
        with cat_model.disabled():
            assert torch.equal(quantized(fresh), plain)
    report = cat_model.report
    assert (report.layer, report.images, report.positions, report.num_clusters) == ("body", 200, 3200, 1)
    assert report.held_out.mse_after < 1e-6 < report.held_out.mse_before
    assert report.accuracy.cat_top1 == 100.0 > report.accuracy.quantized_top1
    assert "CAT fitted to layer 'body' on 200 images (3,200 positions), 1 cluster" in str(report)
    assert "held out: squared error to FP" in str(report)
    assert repr(cat_model).startswith(
        "CATWrapper(Net, attached: layer 'body', 200 images, 1 cluster, squared error to FP"
    )
    assert report.to_dict()["layer"] == "body"
    assert cat_model.attached
    cat_model.remove()
    assert not cat_model.attached
    assert state_of(quantized, fp) == before


def test_hook_is_that_of_the_layer():
    quantized, fp = net_pair()
    x = pixels()
    cat_model = apply_cat(quantized, fp, x, layer="body")
    assert not quantized._forward_hooks
    (hook,) = quantized.body._forward_hooks.values()
    assert find_hooks(quantized) == [hook]
    for again in (quantized, quantized.body):
        with pytest.raises(CATError, match="already attached"):
            CATWrapper(again, ClusterAffine.identity(8))
    with torch.no_grad():
        torch.testing.assert_close(quantized.body(x), fp.body(x), rtol=1e-3, atol=1e-4)
        expected = quantized(x)
        for twin in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), cat_model.bake()):
            torch.testing.assert_close(twin(x), expected)
        baked, half = cat_model.bake(), copy.deepcopy(quantized)
        cat_model.remove()
        torch.testing.assert_close(baked(x), expected)
        torch.testing.assert_close(half(x), expected)
        torch.testing.assert_close(torch.export.export(baked, (x,)).module()(x), expected)
        assert not torch.allclose(quantized(x), expected)
    assert not find_hooks(quantized)


def test_saved_and_loaded(tmp_path):
    quantized, fp = net_pair()
    cat_model = apply_cat(quantized, fp, pixels(), layer="body")
    with torch.no_grad():
        expected = quantized(pixels(5))
        cat_model.save_pretrained(tmp_path)
        cat_model.remove()
        loaded = CATWrapper.from_pretrained(tmp_path, quantized)
        assert torch.equal(quantized(pixels(5)), expected)
    assert (loaded.layer, loaded.report) == ("body", cat_model.report)


def test_clusters_in_paper_mode():
    """A layer whose distortion depends on the sign of its first channel, which two clusters can tell."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(2000, 4, generator=generator)
    f[:, 0] = 5 * f[:, 0].sign()
    q = torch.where(f[:, :1] > 0, 0.5 * f + 1, 0.8 * f - 1)
    owners = torch.arange(100).repeat_interleave(20)
    one, two = (fit_layer(LogitStore.of(q, f, owners), CATConfig.paper(k, alpha=1.0)) for k in (1, 2))
    assert two.scores.mse_after < 1e-6 < one.scores.mse_after < one.scores.mse_before
    torch.testing.assert_close(two.correction(q), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two.correction(q), fit_cluster_affine(q, f, CATConfig.paper(2, alpha=1.0))(q))


def test_scores_are_those_of_separate_fits():
    generator = torch.Generator().manual_seed(2)
    f = torch.randn(400, 3, generator=generator)
    q = 0.7 * f + 0.2 + 0.1 * torch.randn(400, 3, generator=generator)
    owners = torch.arange(40).repeat_interleave(10)
    config = CATConfig.paper(1, alpha=1.0)
    scores = fit_layer(LogitStore.of(q, f, owners), CATConfig()).scores
    out = cross_fitted(q, f, config, owners)
    assert scores.mse_before == pytest.approx((q - f).square().mean().item(), rel=1e-5)
    assert scores.mse_after == pytest.approx((out - f).square().mean().item(), rel=1e-5)
    falls = ((q - f).square() - (out - f).square()).mean(dim=1).reshape(40, 10).mean(dim=1)
    assert scores.mse_error == pytest.approx((falls.std() / 40**0.5).item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["no error", "noise", "one image"])
def test_left_alone_where_nothing_is_gained(kind):
    f = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    q = {"no error": f, "noise": f + 1e-3 * noise, "one image": 0.5 * f}[kind]
    owners = torch.zeros(300, dtype=torch.int64) if kind == "one image" else None
    fit = fit_layer(LogitStore.of(q, f, owners), CATConfig())
    assert torch.equal(fit.correction(q), q)
    assert fit.scores is None if kind == "one image" else not fit.scores.accepted


def test_a_fall_within_its_error_is_chance():
    assert ErrorScores(1.0, 0.8, 0.1).accepted
    assert not ErrorScores(1.0, 0.95, 0.1).accepted
    assert not ErrorScores(1.0, 1.2, 0.1).accepted


def test_report_of_a_layer_that_is_left_alone():
    fp = Net().eval()
    quantized = copy.deepcopy(fp)
    cat_model = apply_cat(quantized, fp, pixels(50), layer="body")
    assert "CAT fitted to layer 'body' on 50 images (800 positions): the model is left as it is" in str(
        cat_model.report
    )
    assert "left as it is" in repr(cat_model)
    with torch.no_grad():
        assert torch.equal(quantized(pixels(5)), fp(pixels(5)))


class Twice(Net):
    """Runs one layer twice, and one not at all."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.act(self.act(self.body(x))).mean(dim=(2, 3)))


def twice_pair():
    return Twice(), Twice()


ERRORS = {
    "unknown": (net_pair, {"layer": "layer4"}, "layer='layer4' is no layer of Net; its children are body, head, act"),
    "no name": (net_pair, {"layer": 3}, "layer=3 is no layer of Net"),
    "missing in FP": (lambda: (net_pair()[0], nn.Flatten()), {"layer": "body"}, "layer='body' is no layer of Flatten"),
    "twice": (twice_pair, {"layer": "act"}, "layer 'act' of quantized_model ran 2 times in a forward pass"),
    "never": (twice_pair, {"layer": "unused"}, "layer 'unused' of quantized_model did not run in a forward pass"),
    "no class axis": (net_pair, {"layer": "head", "config": CATConfig(class_axis=3)}, None),
    "wrong class axis": (
        net_pair,
        {"layer": "body", "config": CATConfig(class_axis=4)},
        r"class_axis=4 for an output of shape \(64, 8, 4, 4\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_leave_no_trace(case):
    make, arguments, message = ERRORS[case]
    quantized, fp = make()
    before = state_of(quantized, fp)
    if message is None:  # outputs without positions have one axis for classes
        apply_cat(quantized, fp, pixels(), **arguments).remove()
    else:
        with pytest.raises(CATError, match=message):
            apply_cat(quantized, fp, pixels(), **arguments)
    assert state_of(quantized, fp) == before


def test_output_speaks_of_the_layer_and_not_of_the_model():
    quantized, fp = net_pair()
    for model in (quantized, fp):
        model.body.register_forward_hook(lambda module, args, out: {"a": out, "b": out})
        model.act.register_forward_pre_hook(lambda module, args: args[0]["a"])
        model.register_forward_hook(lambda module, args, out: {"logits": out, "a": out[:, :3]})
    x = pixels()
    labels = fp(x)["logits"].argmax(dim=1)
    cat_model = apply_cat(quantized, fp, x, layer="body", output="a", eval_loader=[(x, labels)])
    assert (cat_model.report.accuracy.fp_top1, cat_model.report.accuracy.top_k) == (100.0, 5)


def test_channels_last_layers_by_class_axis():
    quantized, fp = net_pair()
    x = pixels()
    for model in (quantized, fp):
        model.body.register_forward_hook(lambda module, args, out: out.movedim(1, -1))
        model.act.register_forward_pre_hook(lambda module, args: args[0].movedim(-1, 1).contiguous())
    cat_model = apply_cat(quantized, fp, x, layer="body", config=CATConfig(class_axis=-1))
    with torch.no_grad():
        torch.testing.assert_close(to_rows(quantized.body(x), -1), to_rows(fp.body(x), -1), rtol=1e-3, atol=1e-4)
        assert cat_model(x).shape == (200, 10)
