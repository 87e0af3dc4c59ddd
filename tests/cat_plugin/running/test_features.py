import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from cat_plugin import CATConfig, CATError, CATWrapper, apply_cat, fit_cluster_affine
from cat_plugin.running.collect import collect_outputs
from cat_plugin.running.features import FeatureTap
from tests.cat_plugin.helpers import SmallNet, images, state_of

CONFIG = CATConfig(features="first")


def damaged_pair():
    """A network whose last layer loses two of the hidden units, which `first` still tells."""
    fp = SmallNet().eval()
    quantized = copy.deepcopy(fp)
    with torch.no_grad():
        quantized.last.weight[:, 4:8] = 0
    return quantized, fp


def test_features_reach_the_fit_and_the_hook():
    quantized, fp = damaged_pair()
    x, fresh = images(400), images(50, seed=1)
    before = state_of(quantized, fp)
    with torch.no_grad():
        q, f, h = quantized(x), fp(x), quantized.first(x)
        expected = fit_cluster_affine(q, f, CONFIG, h)(quantized(fresh), quantized.first(fresh))
        plain = fit_cluster_affine(q, f)(quantized(fresh))
        cat_model = apply_cat(quantized, fp, x, config=CONFIG, batch_size=96)
        torch.testing.assert_close(quantized(fresh), expected)
        assert (expected - fp(fresh)).square().mean() < 0.8 * (plain - fp(fresh)).square().mean()
        clone = copy.deepcopy(quantized)
        torch.testing.assert_close(clone(fresh), expected)
        with cat_model.disabled():
            assert not torch.equal(quantized(fresh), expected)
        cat_model.remove()
    assert state_of(quantized, fp) == before


@pytest.mark.parametrize(
    ("shape", "dims"), [((3, 5), ()), ((3, 5, 4, 2), (2, 3)), ((3, 7, 5), (1,)), ((3, 5, 2, 2, 2), (2, 3, 4))], ids=str
)
def test_mean_over_positions(shape, dims):
    model = nn.Sequential(nn.Identity())
    tap = FeatureTap("0").attach(model)
    x = torch.randn(shape)
    model(x)
    torch.testing.assert_close(tap.take(), x.mean(dims) if dims else x)
    with pytest.raises(CATError, match="layer '0' did not run"):
        tap.take()


@pytest.mark.parametrize("layer", [nn.LSTM(6, 3), nn.Flatten(0)])
def test_outputs_that_are_no_features(layer):
    model = nn.Sequential(layer)
    FeatureTap("0").attach(model)
    with pytest.raises(CATError, match=r"layer '0' gave .*features take a floating-point tensor"):
        model(torch.randn(4, 6))


def test_unknown_layer():
    with pytest.raises(CATError, match="features='layer4' is no layer of SmallNet; its children are first, last, norm"):
        collect_outputs(*damaged_pair(), images(), features="layer4")


def test_features_belong_to_auto_mode():
    with pytest.raises(CATError, match="mode='auto', since the published recipe knows logits only"):
        CATConfig(mode="paper", features="first")
    q = torch.randn(100, 3)
    with pytest.raises(CATError, match="which knows logits only; use mode='auto'"):
        fit_cluster_affine(q, q, CATConfig.paper(2), features=q)
    with pytest.raises(CATError, match=r"features are shape \(7, 3\); expected a floating-point tensor \(100, D\)"):
        fit_cluster_affine(q, q, features=q[:7])
    with pytest.raises(CATError, match="features gave 300 NaN or infinite"):
        fit_cluster_affine(q, q, features=q / 0)


def test_correction_without_its_features():
    quantized, fp = damaged_pair()
    with torch.no_grad():
        x = images(400)
        correction = fit_cluster_affine(quantized(x), fp(x), features=quantized.first(x))
    with pytest.raises(CATError, match=r"got no features h; this correction .* of shape \(400, 16\)"):
        correction(fp(x))
    with pytest.raises(CATError, match="give a config whose `features` names their layer"):
        CATWrapper(quantized, correction)
    CATWrapper(quantized, correction, config=CONFIG)
    assert quantized(x).shape == (400, 10)


class Rows(nn.Module):
    """A layer inside that sees two rows an image."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 4), nn.Linear(8, 10)

    def forward(self, x):
        return self.last(self.inner(x.reshape(-1, 3)).reshape(len(x), -1))


def test_layer_that_gives_other_rows():
    with pytest.raises(CATError, match="layer 'inner' gave 128 rows for 64 images"):
        apply_cat(Rows(), Rows(), images(), config=CATConfig(features="inner"))


def test_features_of_several_threads_do_not_mix():
    quantized, fp = damaged_pair()
    x = images(400)
    apply_cat(quantized, fp, x, config=CONFIG)
    parts = x.split(25)
    with torch.no_grad():
        expected = [quantized(part) for part in parts]

    def run(part):
        with torch.no_grad():
            return quantized(part)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for out, wanted in zip(pool.map(run, parts), expected, strict=True):
                torch.testing.assert_close(out, wanted)


def test_hooked_model_can_be_pickled():
    quantized, fp = damaged_pair()
    apply_cat(quantized, fp, images(400), config=CONFIG)
    clone = pickle.loads(pickle.dumps(quantized))
    x = images(9, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(clone(x), quantized(x))
