"""The fit of all layers, through `apply_cat`, on a network with errors planted in every channel."""

import copy
import functools

import pytest
import torch
from torch import nn

from cat_plugin import CATConfig, CATError, apply_cat
from cat_plugin.fitting.processes import ALONE
from cat_plugin.layers import fit
from cat_plugin.layers.fit import Recipe, fitting_by
from tests.cat_plugin.helpers import state_of
from tests.cat_plugin.layers.networks import Net, Rounded, distance, pictures, planted

ALL = CATConfig(layers="all")
IMAGES = 64


def outputs(model, x=None):
    with torch.no_grad():
        return model(pictures(100, seed=9) if x is None else x)


@functools.cache
def fitted():
    quantized, fp = planted()
    return apply_cat(quantized, fp, pictures(IMAGES), config=ALL)


def same(first, second):
    assert list(first.layers) == list(second.layers) != []
    for name, part in first.layers.items():
        assert torch.equal(part.scale, second.layers[name].scale)
        assert torch.equal(part.shift, second.layers[name].shift)


def test_planted_errors_are_found():
    """Also on images that were not fitted on; and nothing of the model changes."""
    cat_model, (quantized, fp) = fitted(), planted()
    expected, plain = outputs(fp), outputs(quantized)
    assert distance(outputs(cat_model), expected) < 0.6 * distance(plain, expected)
    evidence = cat_model.report.layers
    assert evidence.accepted and evidence.inside.divergence < 0.4 * evidence.plain.divergence
    assert evidence.curve[-1] < 0.6 * evidence.curve[0] and evidence.images == IMAGES and evidence.unreached == ()
    assert {name: (part.axis, len(part.scale)) for name, part in cat_model.layers.items()} == {
        "first": (-3, 6),
        "second": (-3, 24),
        "last": (-1, 5),
    }
    assert evidence.operations == 6 * 6 * 6 + 24 * 4 * 4 + 5
    assert cat_model.report.added_parameters >= 2 * (6 + 24 + 5)


@pytest.mark.parametrize("part", ["scales", "offsets"])
def test_one_part_alone(part):
    quantized, fp = planted()
    with fitting_by(Recipe(rates=("far",), steps=0.2, scales=part == "scales", offsets=part == "offsets")):
        cat_model = apply_cat(quantized, fp, pictures(IMAGES), config=ALL)
    assert len(cat_model.layers) == 3 and cat_model.report.layers.rate == "far"
    for correction in cat_model.layers.values():
        assert bool((correction.scale == 1).all()) == (part == "offsets")
        assert bool((correction.shift == 0).all()) == (part == "scales")


def test_a_rate_whose_outputs_are_not_finite_is_not_chosen(monkeypatch):
    fitted_by = fit._Fit._fitted

    def overflowing(self, *args):
        trial = fitted_by(self, *args)
        return trial._replace(outputs=trial.outputs * (torch.nan if trial.rate == "far" else 1))

    monkeypatch.setattr(fit._Fit, "_fitted", overflowing)
    quantized, fp = planted()
    with fitting_by(Recipe(steps=0.3)):
        evidence = apply_cat(quantized, fp, pictures(IMAGES), config=ALL).report.layers
    assert evidence.accepted and evidence.rate in ("midway", "near")


def test_batches_and_seeds():
    """The same corrections from batches of any size, and others with another seed."""
    x = pictures(IMAGES)
    again = apply_cat(*planted(), [part.clone() for part in x.split(IMAGES)], config=ALL)
    same(fitted(), again)
    small = apply_cat(*planted(), list(x.split(10)), config=ALL)
    torch.testing.assert_close(outputs(small), outputs(fitted()), rtol=0, atol=0.1)
    other = apply_cat(*planted(), x, config=CATConfig(layers="all", seed=1))
    assert not torch.equal(outputs(other), outputs(again))


def test_state_of_both_models_stays():
    quantized, fp = planted()
    quantized.train()
    quantized.last.weight.requires_grad_(False)
    quantized.first.bias.grad = torch.ones(6)
    before = state_of(quantized, fp)
    apply_cat(quantized, fp, pictures(IMAGES), config=ALL, augment="flip").remove()
    assert state_of(quantized, fp) == before


class Stop(nn.Module):
    """Raises at the given pass of the model."""

    def __init__(self, at, error):
        super().__init__()
        self.left, self.error = at, error

    def __call__(self, module, args):
        self.left -= 1
        if self.left == 0:
            raise self.error("stopped")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 9, 20], ids=lambda at: f"pass {at}")
def test_an_error_at_any_pass_leaves_all_as_it_was(at, error):
    quantized, fp = planted()
    handle = quantized.last.register_forward_pre_hook(Stop(at, error))
    quantized.first.bias.grad = torch.ones(6)
    before = state_of(quantized, fp)
    try:
        apply_cat(quantized, fp, pictures(IMAGES), config=ALL).remove()
    except error:
        pass
    else:  # a trial of gradients that fails is no error, but no layers either
        assert error is RuntimeError
    handle.remove()
    before[0]["hooks"] = [{} for _ in before[0]["hooks"]]
    assert state_of(quantized, fp) == before


class NoGradient(Rounded):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class LastRounded(Net):
    """Rounds its output without a gradient, so that none reaches a layer."""

    def forward(self, x):
        with torch.no_grad():
            return (super().forward(x) * 8).round() / 8


def test_layers_that_no_gradient_reaches_are_named():
    quantized, fp = planted(rounding=NoGradient)
    cat_model = apply_cat(quantized, fp, pictures(IMAGES), config=ALL)
    assert cat_model.report.layers.unreached == ("first", "second")
    assert set(cat_model.layers) <= {"last"}
    assert "no gradient reaches 2 layers: first, second" in str(cat_model.report)


def exported(model):
    dynamic = ({0: torch.export.Dim("images", min=1)},)
    return torch.export.export(model, (pictures(4),), dynamic_shapes=dynamic).module()


def scripted(model):
    return nn.Sequential(torch.jit.trace(model, pictures(2)))


def without(model):
    other = LastRounded().eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [exported, scripted, without])
def test_models_without_layers_or_gradients_are_corrected_at_their_output(make):
    quantized, fp = planted()
    report = apply_cat(make(quantized), fp, pictures(IMAGES)).report
    assert not report.layers.accepted and report.evidence.accepted
    assert report.layers.reason.startswith(("no layer ", "no gradient reaches a layer"))


def test_repeated_images_count_once():
    x = pictures(IMAGES)
    repeated = apply_cat(*planted(), torch.cat([x, x[:20]]), config=ALL)
    assert repeated.report.layers.images == IMAGES


def test_too_few_images():
    cat_model = apply_cat(*planted(), pictures(20))
    assert cat_model.layers == {} and "20 different images are too few for layers" in cat_model.report.layers.reason


class Maps(Net):
    """Logits at every position (N, 5, 4, 4)."""

    def forward(self, x):
        x = self.rounded(torch.relu(self.first(x)))
        x = self.rounded_again(torch.relu(self.second(x)))
        return self.last(x.movedim(1, -1)).movedim(-1, 1)


class One(Net):
    def forward(self, x):
        return super().forward(x)[:, 1:2]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Net, {"output_kind": "sigmoid"}), (Net, {"output_kind": "value"}), (One, {}), (Maps, {"positions": 5})],
    ids=["sigmoid", "value", "one logit", "maps"],
)
def test_kinds_of_outputs(kind, options):
    quantized, fp = planted()
    for model in (quantized, fp):
        model.__class__ = kind
    plain, expected = outputs(quantized), outputs(fp)
    cat_model = apply_cat(quantized, fp, pictures(IMAGES), config=CATConfig(layers="all", **options))
    evidence = cat_model.report.layers
    assert evidence.curve[-1] < 0.8 * evidence.curve[0]
    assert distance(outputs(cat_model), expected) < 0.8 * distance(plain, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_types_of_models(dtype):
    quantized, fp = (model.to(dtype) for model in planted())
    x = pictures(100, seed=9).to(dtype)
    plain, expected = outputs(quantized, x).double(), outputs(fp, x).double()
    cat_model = apply_cat(quantized, fp, pictures(IMAGES).to(dtype), config=ALL)
    assert cat_model.layers and outputs(cat_model, x).dtype == dtype
    assert distance(outputs(cat_model, x).double(), expected) < 0.6 * distance(plain, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_precision_is_that_of_the_caller(dtype):
    (quantized, fp), x = planted(), pictures(100, seed=9)
    with torch.autocast("cpu", dtype):
        plain, expected = outputs(quantized, x).float(), outputs(fp, x).float()
        cat_model = apply_cat(quantized, fp, pictures(IMAGES), config=ALL)
        assert outputs(cat_model, x).dtype == dtype
        assert distance(outputs(cat_model, x).float(), expected) < 0.6 * distance(plain, expected)
    assert {correction.scale.dtype for correction in cat_model.layers.values()} == {torch.float32}
    assert outputs(cat_model, x).dtype == torch.float32
    assert distance(outputs(cat_model, x), outputs(fp, x)) < 0.7 * distance(plain, expected)


def test_layers_whose_gradient_is_small_in_half_precision_are_reached():
    generator = torch.Generator().manual_seed(0)
    fp = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 5))
    with torch.no_grad():
        for layer, size in zip(fp, (3e3, 1e-6), strict=True):
            layer.weight.copy_(size * torch.randn(layer.weight.shape, generator=generator))
            layer.bias.zero_()
        quantized = copy.deepcopy(fp)
        quantized[0].weight.mul_(1 + 0.3 * torch.randn(8, 1, generator=generator))
    with torch.autocast("cpu", torch.float16):
        cat_model = apply_cat(quantized, fp, torch.randn(128, 8, generator=generator), config=ALL)
    assert cat_model.report.layers.unreached == ()


def test_inside_of_inference_mode():
    quantized, fp = planted()
    with torch.inference_mode():
        cat_model = apply_cat(quantized, fp, pictures(IMAGES), config=ALL)
    same(cat_model, fitted())
    cat_model.quantized_model(pictures(2)).sum().backward()


def test_views_and_inputs_by_a_function():
    batches = [{"x": part} for part in pictures(IMAGES).split(16)]
    cat_model = apply_cat(*planted(), batches, config=ALL, forward_fn=lambda model, batch: model(batch["x"]))
    assert cat_model.layers
    flipped = apply_cat(*planted(), pictures(IMAGES), config=ALL, augment="flip")
    assert flipped.layers and flipped.report.layers.images == IMAGES
    with pytest.raises(CATError, match="augment='turn' should be \"flip\", or a function of a batch of images"):
        apply_cat(*planted(), pictures(IMAGES), augment="turn")


def test_names():
    cat_model = apply_cat(*planted(), pictures(IMAGES), config=CATConfig(layers=("second",)))
    assert set(cat_model.layers) <= {"second"} and [each.name for each in cat_model.report.layers.layers] == ["second"]
    quantized, fp = planted()
    before = state_of(quantized, fp)
    with pytest.raises(CATError, match="'third' is no layer of Net"):
        apply_cat(quantized, fp, pictures(IMAGES), config=CATConfig(layers=("second", "third")))
    assert state_of(quantized, fp) == before


@pytest.mark.parametrize(
    ("trials", "chosen", "tried"),
    [
        ({"far": [1.0, 1, 1, 1], "midway": [0.5, 0.5, 0.5, 0.5], "near": [0.0, 0, 0, 0]}, "midway", 2),
        ({"far": [9.0, 9, 9, 9], "midway": [4.0, 4, 4, 4], "near": [4.0, 3, 3, 3]}, None, 3),
        ({"far": [9.0, 9, 9, 9], "midway": [2.0, 2, 2, 2], "near": [9.0, 1, 1, 1]}, "midway", 3),
        ({"far": [4.0, 1, 1, 1], "midway": [9.0, 1, 1, 1], "near": [0.0, 0, 0, 0]}, "far", 2),
        # One image holds most of the mean, which falls; of its root the others hold more, and that rises.
        ({"far": [99.0, 9, 9, 9], "midway": [98.0, 9, 9, 9], "near": [9.0, 4, 1.2, 1.2]}, None, 3),
        ({"far": [float("nan")] * 4, "midway": [float("nan")] * 4, "near": [float("nan")] * 4}, None, 2),
    ],
)
def test_rates_are_tried_from_far_to_near_while_images_come_nearer(trials, chosen, tried):
    """By a table of divergences of four images: before, they are 16, 1, 1 and 1."""
    run = object.__new__(fit._Fit)
    run.processes, run.q = ALONE, torch.tensor([[16.0], [1.0], [1.0], [1.0]])
    run.rows_of = lambda images: (images, images)
    run._divergences = lambda outputs, images: outputs.squeeze(1).double()
    done = []

    def fitted(rate):
        done.append(rate)
        return fit._Trial(rate, torch.zeros(1), (), torch.tensor(trials[rate]).unsqueeze(1))

    best = run._nearest(fitted, tuple(fit.RATES), torch.arange(4))
    assert (best and best.rate, len(done)) == (chosen, tried)


class IntoOneTensor(nn.Module):
    """Writes all its outputs into one tensor, and remembers another that has a graph."""

    def __init__(self, net):
        super().__init__()
        self.net, self.out = net, torch.empty(64, 5)
        self.loss = torch.ones(1, requires_grad=True) * 2

    def forward(self, x):
        return self.out[: len(x)].copy_(self.net(x))


def test_a_model_that_writes_its_outputs_into_one_tensor():
    (plain, fp), (quantized, _) = planted(), planted()
    quantized = IntoOneTensor(quantized)
    cat_model = apply_cat(quantized, fp, pictures(IMAGES), config=ALL)
    reference = apply_cat(plain, fp, pictures(IMAGES), config=ALL)
    assert [name.removeprefix("net.") for name in cat_model.layers] == list(reference.layers) != []
    for part, other in zip(cat_model.layers.values(), reference.layers.values(), strict=True):
        torch.testing.assert_close(part.scale, other.scale)
    assert quantized.loss.grad_fn is not None and not quantized.out.requires_grad
    del quantized.loss
    copy.deepcopy(quantized)
