import ast
import io
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import baselines.reconstruction.engine
from baselines import quantize
from baselines.recipes import PD_QUANT, QDROP, RECIPES, Correction, Prediction, Recipe, Stage
from baselines.reconstruction import losses
from baselines.reconstruction.cache import Cached

from ..networks import SmallResNet, images, randomized

BOTH = (Stage(rounding=True, activation_scales=True),)


@pytest.fixture
def run(monkeypatch):
    """Quantize the small network with any recipe."""
    import baselines.api as api

    def run(recipe: Recipe, iters=30, seed=0, bits=2, inputs=None, model=None):
        monkeypatch.setattr(api, "RECIPES", {"custom": recipe})
        model = randomized(SmallResNet()) if model is None else model
        inputs = images(40) if inputs is None else inputs
        return api.quantize(
            model, inputs, method="custom", w_bits=bits, a_bits=bits, iters=iters, batch_size=16, seed=seed
        )

    return run


def error(network, inputs):
    with torch.no_grad():
        return (network(inputs) - randomized(SmallResNet())(inputs)).square().mean().item()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_reconstruction_beats_round_to_nearest_on_its_own_objective(run):
    inputs = images(40)
    assert error(run(QDROP, iters=150), inputs) < 0.8 * error(run(Recipe()), inputs)


@pytest.mark.parametrize("recipe", [QDROP, PD_QUANT], ids=["qdrop", "pd_quant"])
def test_same_seed_same_network_other_seed_another(run, recipe):
    assert same(run(recipe, seed=3), run(recipe, seed=3))
    assert not same(run(recipe, seed=3), run(recipe, seed=4))


def test_keep_probability_one_equals_a_run_without_mixing(run, monkeypatch):
    kept = run(Recipe(stages=BOTH, keep_probability=1.0))
    for module in ("quantization.quantizers", "reconstruction.engine"):
        monkeypatch.setattr(f"baselines.{module}.coin_flips", lambda like, *args: torch.ones_like(like))
    assert same(run(Recipe(stages=BOTH, keep_probability=0.5)), kept)


@pytest.mark.parametrize(
    ("stage", "weights_move", "scales_move"),
    [
        (Stage(rounding=True, quantize_activations=False), True, False),
        (Stage(activation_scales=True), False, True),
        (Stage(rounding=True, activation_scales=True), True, True),
    ],
    ids=["rounding", "scales", "both"],
)
def test_a_stage_changes_what_it_learns_and_nothing_else(run, stage, weights_move, scales_move):
    plain = run(Recipe()).state_dict()
    learned = run(Recipe(stages=(replace(stage, rounding_lr=0.1, scale_lr=1e-2),)), iters=60).state_dict()
    moved = {key for key in plain if not torch.equal(plain[key], learned[key])}
    assert any(key.endswith("weight") for key in moved) == weights_move
    assert any(key.endswith("input_quantizer.scale") for key in moved) == scales_move
    assert all(key.endswith(("weight", "input_quantizer.scale")) for key in moved)


def test_all_weights_end_on_their_grid(run):
    network = run(QDROP)
    for layer in (m for m in network.modules() if getattr(m, "weight_quantizer", None) is not None):
        quantizer = layer.weight_quantizer
        integers = layer.weight / quantizer.scale + quantizer.zero_point
        torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-3)
        assert integers.round().min() >= 0 and integers.round().max() <= quantizer.levels


def test_loss_that_is_not_finite_names_unit_and_step(run, monkeypatch):
    real = losses.reconstruction_error
    calls = []

    def broken(output, target, axis, norm, weights):
        calls.append(axis)
        return real(output, target, axis, norm) * (float("nan") if len(calls) > 35 else 1)

    monkeypatch.setattr("baselines.reconstruction.engine.reconstruction_error", broken)
    with pytest.raises(FloatingPointError, match=r"loss of layer1\.0 is nan at step 5"):
        run(QDROP)


ENGINE = sorted(set(Path(baselines.__file__).parent.rglob("*.py")) - {Path(baselines.__file__).with_name("recipes.py")})


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.stem)
def test_only_recipes_and_the_default_know_the_name_of_a_method(path):
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    words = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    words += [node.id for node in nodes if isinstance(node, ast.Name)]
    words += [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    assert {word.lower() for word in words} & set(RECIPES) == ({"qdrop"} if path.stem == "api" else set())


@pytest.mark.parametrize(
    ("step", "beta"),
    [(0, None), (19, None), (20, 20.0), (60, 11.0), (100, 2.0)],
)
def test_annealed_beta_follows_the_authors_schedule(step, beta):
    assert losses.annealed_beta(step, 100, 0.2, 20.0, 2.0) == beta


@pytest.mark.parametrize("beta", [2.0, 5.5])
def test_rounding_penalty_slope_is_the_derivative(beta):
    fraction = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64, requires_grad=True)
    (1 - (2 * fraction - 1).abs() ** beta).sum().backward()
    torch.testing.assert_close(losses.rounding_penalty_slope(fraction.detach(), beta), fraction.grad)


def test_reconstruction_error_takes_other_norms():
    output = torch.tensor([[1.0, -2.0]])
    error = losses.reconstruction_error(output, torch.zeros(1, 2), 1, 2.4)
    assert error.item() == pytest.approx(1 + 2**2.4)


def test_stages_walk_the_whole_network_one_after_the_other(run, monkeypatch):
    """BRECQ: while roundings are learned no activation is quantized, and scales are learned behind hard weights."""
    seen, real = [], baselines.reconstruction.engine.UnitRun.finish

    def watch(self, bar):
        quantizers = [m for m in self.module.modules() if hasattr(m, "bypass")]
        hard = all(layer.weight.unique().numel() <= 4 * len(layer.weight) for layer in self._layers[:1])
        seen.append((self.unit.name, self._stage.rounding, all(q.bypass for q in quantizers), hard))
        real(self, bar)

    monkeypatch.setattr(baselines.reconstruction.engine.UnitRun, "finish", watch)
    network = run(RECIPES["brecq"], iters=3)
    assert [(name, rounding) for name, rounding, _, _ in seen] == [
        *((name, True) for name in ("conv1", "layer1.0", "layer1.1", "fc")),
        *((name, False) for name in ("conv1", "layer1.0", "layer1.1", "fc")),
    ]
    assert all(bypassed == rounding for name, rounding, bypassed, _ in seen if name != "conv1")
    assert [hard for name, _, _, hard in seen if name.startswith("layer1")] == [False, False, True, True]
    assert not any(m.bypass for m in network.modules() if hasattr(m, "bypass"))


def test_scales_of_brecq_are_learned_on_the_inputs_of_the_fp_network(run, monkeypatch):
    fp_input = []  # of layer1.1, from the FP network itself
    model = randomized(SmallResNet())
    handle = model.layer1[1].register_forward_pre_hook(lambda module, args: fp_input.append(args[0]))
    with torch.no_grad():
        model(images(40))
    handle.remove()
    near, real = [], baselines.reconstruction.engine.UnitRun.finish

    def watch(self, bar):
        if self.unit.name == "layer1.1":
            near.append(torch.allclose(self.data.input.tensor, fp_input[0], atol=1e-4))
        real(self, bar)

    monkeypatch.setattr(baselines.reconstruction.engine.UnitRun, "finish", watch)
    run(RECIPES["brecq"], iters=3, model=model)
    assert near == [False, True]  # roundings, then scales


@pytest.mark.parametrize("axis", [1, -1])
def test_reconstruction_error_sums_channels_and_averages_the_rest(axis):
    output, target = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    assert losses.reconstruction_error(output, target, axis).item() == (3 if axis == 1 else 4)


def test_progress_is_reported_on_demand_only(run, capsys, caplog):
    with caplog.at_level(logging.DEBUG, logger="baselines"):
        run(QDROP, iters=3)
    assert "layer1.0 step 0" in caplog.text
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("iters", "expected"),
    [(20_000, 1e-3), (40_000, 1e-3), (5_000, 4e-3), (10, 0.1)],
    ids=["published", "longer", "shorter", "capped"],
)
def test_shorter_runs_take_the_roundings_as_far(iters, expected):
    assert QDROP.stages[0].rounding_lr_for(iters) == pytest.approx(expected)


def test_layers_outside_of_units_are_rounded_before_the_first_unit_sees_data(run, monkeypatch):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.fc = torch.nn.Conv2d(3, 3, 1), torch.nn.Linear(192, 5)

        def forward(self, x):
            return self.fc(self.twice(self.twice(x)).flatten(1))

    seen, real = [], baselines.reconstruction.engine.UnitRun.finish

    def watch(self, bar):
        seen.append(self.data.input.tensor)
        real(self, bar)

    monkeypatch.setattr(baselines.reconstruction.engine.UnitRun, "finish", watch)
    network = run(QDROP, iters=2, model=randomized(Twice()))
    with torch.no_grad():
        expected = network.twice(network.twice(images(40))).flatten(1)
    torch.testing.assert_close(seen[0], expected)


def test_weights_are_on_the_grid_when_only_scales_are_learned(run, monkeypatch):
    seen, real = [], baselines.reconstruction.engine.UnitRun.finish

    def watch(self, bar):
        layers = [layer for layer in self._layers if layer.weight_quantizer.bits == 2]
        seen.extend(layer.weight.unique().numel() <= 4 * len(layer.weight) for layer in layers)
        real(self, bar)

    monkeypatch.setattr(baselines.reconstruction.engine.UnitRun, "finish", watch)
    run(Recipe(stages=(Stage(activation_scales=True),)), iters=2)
    assert len(seen) == 5 and all(seen)


def divergence(network, inputs):
    with torch.no_grad():
        return losses.prediction_difference(network(inputs), randomized(SmallResNet())(inputs), 1.0).item()


def test_prediction_loss_brings_the_predictions_nearer(run):
    inputs = images(40)
    without = run(replace(QDROP, prediction=Prediction(weight=0.0, temperature=1.0)), iters=100)
    weighted = run(replace(QDROP, prediction=Prediction(weight=1000.0, temperature=1.0)), iters=100)
    assert divergence(weighted, inputs) < 0.8 * divergence(without, inputs)


def test_predictions_come_from_unmixed_inputs_of_the_share_of_a_batch(run, monkeypatch):
    seen, real = [], baselines.reconstruction.engine.UnitRun._inputs

    def watch(self, chosen):
        x, unmixed = real(self, chosen)
        quantized = self.data.input.rows(chosen)[: len(unmixed)]
        if self._entry is not None:
            with torch.no_grad():
                quantized = (quantized / self._entry.scale).round().clamp(0, self._entry.levels) * self._entry.scale
        seen.append((len(x), len(unmixed), torch.allclose(unmixed, quantized), torch.allclose(x[:4], quantized)))
        return x, unmixed

    monkeypatch.setattr(baselines.reconstruction.engine.UnitRun, "_inputs", watch)
    run(replace(QDROP, prediction=Prediction(weight=1.0, temperature=4.0, share=0.25)), iters=3)
    assert {(size, few, unmixed) for size, few, unmixed, _ in seen} == {(16, 4, True)}
    assert not all(as_unmixed for *_, as_unmixed in seen)


@pytest.mark.parametrize(("classes", "expected"), [(1000, 10.0), (5000, 10.0), (10, 2.4345), (1, 1.2593)])
def test_fewer_classes_weigh_less(classes, expected):
    prediction = Prediction(weight=10.0, classes=1000, temperature=4.0)
    assert prediction.weight_for(classes) == pytest.approx(expected, rel=1e-4)
    assert replace(prediction, classes=None).weight_for(classes) == 10.0


def test_corrected_inputs_are_what_is_mixed_in_and_what_the_target_comes_from(run, monkeypatch):
    seen, real = {}, baselines.reconstruction.engine.UnitRun.steps

    def watch(self):
        seen[self.unit.name] = self.data
        with torch.no_grad():
            target = self.fp_module(self.data.fp_input.tensor)
            target = target if self.activation is None else self.activation(target)
        torch.testing.assert_close(self.data.target.tensor, target)
        yield from real(self)

    monkeypatch.setattr(baselines.reconstruction.engine.UnitRun, "steps", watch)
    run(replace(QDROP, correction=Correction(closeness=1.0, steps=5, lr=0.05)), iters=2)
    assert not torch.equal(seen["conv1"].fp_input.tensor, seen["conv1"].input.tensor)
    torch.testing.assert_close(seen["conv1"].input.tensor, images(40))
    assert (seen["conv1"].fp_input.tensor - images(40)).abs().mean() > 0.01


def test_weights_of_the_error_multiply_its_elements():
    output, weights = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.5]])
    assert losses.reconstruction_error(output, torch.zeros(1, 2), 1, 2.0, weights).item() == pytest.approx(3 + 0.5 * 4)


def test_fisher_weights_go_with_the_unit_and_change_what_is_learned(run, monkeypatch):
    seen, real = [], baselines.reconstruction.engine.UnitRun.steps

    def watch(self):
        seen.append((self.data.weights, self.data.target))
        assert all(layer.soft_weight is None for layer in self._layers)
        yield from real(self)

    plain = run(RECIPES["brecq"], iters=30)
    monkeypatch.setattr(baselines.reconstruction.engine.UnitRun, "steps", watch)
    weighted = run(replace(RECIPES["brecq"], error_weighting="fisher"), iters=30)
    assert all(weights.tensor.shape == target.tensor.shape for weights, target in seen)
    assert all(weights.tensor.mean().item() == pytest.approx(1, rel=1e-3) for weights, _ in seen)
    assert not same(plain, weighted)


def test_rate_of_the_scales_falls_along_a_cosine_and_that_of_the_roundings_stays(run, monkeypatch):
    rates, real = [], torch.optim.Adam.step

    def step(self, *args):
        rates.append([group["lr"] for group in self.param_groups])
        return real(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    run(
        Recipe(stages=(Stage(rounding=True, activation_scales=True, iters=4, rounding_lr=0.02, scale_lr=0.1),)), iters=4
    )
    behind_conv1 = rates[4:]  # which reads the image, so that it has no scale
    assert len(behind_conv1) == 12 and [lr for lr, *_ in rates] == [0.02] * 16
    expected = [0.1, 0.1 * (1 + 0.5**0.5) / 2, 0.05, 0.1 * (1 - 0.5**0.5) / 2] * 3
    assert [lr for _, lr in behind_conv1] == pytest.approx(expected)


def test_exponents_of_the_errors_are_those_of_the_stages(run, monkeypatch):
    seen, real = [], losses.reconstruction_error

    def watch(output, target, axis, norm, weights):
        seen.append(norm)
        return real(output, target, axis, norm, weights)

    monkeypatch.setattr("baselines.reconstruction.engine.reconstruction_error", watch)
    run(RECIPES["brecq"], iters=2)
    assert seen == [2.0] * 4 * 2 + [2.4] * 3 * 2  # conv1 has no scale


@pytest.mark.parametrize(
    ("iters", "within"), [(1, [0, 1]), (50, [0, 49, 50]), (101, [0, 50, 100, 101])], ids=["1", "50", "101"]
)
@pytest.mark.parametrize("recipe", [QDROP, RECIPES["brecq"]], ids=["qdrop", "brecq"])
def test_progress_counts_every_step_once(run, monkeypatch, recipe, iters, within):
    shown, bars = [], []

    class Bar(baselines.reconstruction.engine.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

        def update(self, n=1):
            super().update(n)
            shown.append(self.n)

    monkeypatch.setattr(baselines.reconstruction.engine, "tqdm", Bar)
    run(recipe, iters=iters)
    walks = len(recipe.stages)
    expected = [
        iters * unit + step
        for unit in range(4 * walks)
        for step in ([iters] if unit == 4 else within)  # conv1 has no scale to learn
    ]
    assert shown == expected
    assert bars[0].total == iters * 4 * walks


@pytest.mark.parametrize(
    ("w_bits", "a_bits", "walks"), [(2, 2, [True, False]), (32, 2, [False]), (2, 32, [True]), (32, 32, [])]
)
def test_stages_with_nothing_to_learn_are_no_walk(monkeypatch, w_bits, a_bits, walks):
    seen, real = [], baselines.reconstruction.engine._walk

    def watch(job, number):
        seen.append(job.recipe.stages[number].rounding)
        return real(job, number)

    monkeypatch.setattr(baselines.reconstruction.engine, "_walk", watch)
    quantize(randomized(SmallResNet()), images(40), method="brecq", w_bits=w_bits, a_bits=a_bits, iters=2)
    assert seen == walks


@pytest.mark.parametrize(("norm", "times"), [(True, 2), (False, 1)], ids=["batch-norm", "none"])
def test_outputs_are_computed_again_only_where_inputs_were_corrected(run, norm, times):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3) if norm else torch.nn.Identity(), torch.nn.ReLU()
    )
    model = randomized(torch.nn.Sequential(model, torch.nn.Flatten(), torch.nn.Linear(192, 5)))
    mapped, real = [], Cached.mapped

    def watch(self, module, size):
        mapped.append(type(module))
        return real(self, module, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cached, "mapped", watch)
        run(replace(QDROP, correction=Correction(closeness=1.0, steps=1, lr=0.05)), iters=1, model=model)
    assert mapped.count(torch.nn.Conv2d) == times
