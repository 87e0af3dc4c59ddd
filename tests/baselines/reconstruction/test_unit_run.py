import logging
from dataclasses import replace

import pytest
import torch

from baselines.recipes import QDROP, RECIPES, Prediction, Recipe, Stage
from baselines.reconstruction import losses
from baselines.reconstruction.unit_run import UnitRun

from ..networks import SmallResNet, images, randomized, same

BOTH = (Stage(rounding=True, activation_scales=True),)


def test_keep_probability_one_equals_a_run_without_mixing(run, monkeypatch):
    kept = run(Recipe(stages=BOTH, keep_probability=1.0))
    for module in ("quantization.quantizers", "reconstruction.unit_run"):
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

    monkeypatch.setattr("baselines.reconstruction.unit_run.reconstruction_error", broken)
    with pytest.raises(FloatingPointError, match=r"loss of layer1\.0 is nan at step 5"):
        run(QDROP)


def test_progress_is_reported_on_demand_only(run, capsys, caplog):
    with caplog.at_level(logging.DEBUG, logger="baselines"):
        run(QDROP, iters=3)
    assert "layer1.0 step 0" in caplog.text
    assert capsys.readouterr().err == ""


def divergence(network, inputs):
    with torch.no_grad():
        return losses.prediction_difference(network(inputs), randomized(SmallResNet())(inputs), 1.0).item()


def test_prediction_loss_brings_the_predictions_nearer(run):
    inputs = images(40)
    without = run(replace(QDROP, prediction=Prediction(weight=0.0, temperature=1.0)), iters=100)
    weighted = run(replace(QDROP, prediction=Prediction(weight=1000.0, temperature=1.0)), iters=100)
    assert divergence(weighted, inputs) < 0.8 * divergence(without, inputs)


def test_predictions_come_from_unmixed_inputs_of_the_share_of_a_batch(run, monkeypatch):
    seen, real = [], UnitRun._inputs

    def watch(self, chosen):
        x, unmixed = real(self, chosen)
        quantized = self.data.input.rows(chosen)[: len(unmixed)]
        if self._entry is not None:
            with torch.no_grad():
                quantized = (quantized / self._entry.scale).round().clamp(0, self._entry.levels) * self._entry.scale
        seen.append((len(x), len(unmixed), torch.allclose(unmixed, quantized), torch.allclose(x[:4], quantized)))
        return x, unmixed

    monkeypatch.setattr(UnitRun, "_inputs", watch)
    run(replace(QDROP, prediction=Prediction(weight=1.0, temperature=4.0, share=0.25)), iters=3)
    assert {(size, few, unmixed) for size, few, unmixed, _ in seen} == {(16, 4, True)}
    assert not all(as_unmixed for *_, as_unmixed in seen)


def test_fisher_weights_go_with_the_unit_and_change_what_is_learned(run, monkeypatch):
    seen, real = [], UnitRun.steps

    def watch(self):
        seen.append((self.data.weights, self.data.target))
        assert all(layer.soft_weight is None for layer in self._layers)
        yield from real(self)

    plain = run(RECIPES["brecq"], iters=30)
    monkeypatch.setattr(UnitRun, "steps", watch)
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

    monkeypatch.setattr("baselines.reconstruction.unit_run.reconstruction_error", watch)
    run(RECIPES["brecq"], iters=2)
    assert seen == [2.0] * 4 * 2 + [2.4] * 3 * 2  # conv1 has no scale
