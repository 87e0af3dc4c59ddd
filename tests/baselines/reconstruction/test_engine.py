import io
from dataclasses import replace

import pytest
import torch

from baselines import quantize
from baselines.recipes import PD_QUANT, QDROP, RECIPES, Correction, Recipe, Stage
from baselines.reconstruction import engine
from baselines.reconstruction.cache import Cached
from baselines.reconstruction.unit_run import UnitRun

from ..networks import SmallResNet, images, randomized, same


def error(network, inputs):
    with torch.no_grad():
        return (network(inputs) - randomized(SmallResNet())(inputs)).square().mean().item()


def test_reconstruction_beats_round_to_nearest_on_its_own_objective(run):
    inputs = images(40)
    assert error(run(QDROP, iters=150), inputs) < 0.8 * error(run(Recipe()), inputs)


@pytest.mark.parametrize("recipe", [QDROP, PD_QUANT], ids=["qdrop", "pd_quant"])
def test_same_seed_same_network_other_seed_another(run, recipe):
    assert same(run(recipe, seed=3), run(recipe, seed=3))
    assert not same(run(recipe, seed=3), run(recipe, seed=4))


def test_stages_walk_the_whole_network_one_after_the_other(run, monkeypatch):
    """BRECQ: while roundings are learned no activation is quantized, and scales are learned behind hard weights."""
    seen, real = [], UnitRun.finish

    def watch(self, bar):
        quantizers = [m for m in self.module.modules() if hasattr(m, "bypass")]
        hard = all(layer.weight.unique().numel() <= 4 * len(layer.weight) for layer in self._layers[:1])
        seen.append((self.unit.name, self._stage.rounding, all(q.bypass for q in quantizers), hard))
        real(self, bar)

    monkeypatch.setattr(UnitRun, "finish", watch)
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
    near, real = [], UnitRun.finish

    def watch(self, bar):
        if self.unit.name == "layer1.1":
            near.append(torch.allclose(self.data.input.tensor, fp_input[0], atol=1e-4))
        real(self, bar)

    monkeypatch.setattr(UnitRun, "finish", watch)
    run(RECIPES["brecq"], iters=3, model=model)
    assert near == [False, True]  # roundings, then scales


def test_layers_outside_of_units_are_rounded_before_the_first_unit_sees_data(run, monkeypatch):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.fc = torch.nn.Conv2d(3, 3, 1), torch.nn.Linear(192, 5)

        def forward(self, x):
            return self.fc(self.twice(self.twice(x)).flatten(1))

    seen, real = [], UnitRun.finish

    def watch(self, bar):
        seen.append(self.data.input.tensor)
        real(self, bar)

    monkeypatch.setattr(UnitRun, "finish", watch)
    network = run(QDROP, iters=2, model=randomized(Twice()))
    with torch.no_grad():
        expected = network.twice(network.twice(images(40))).flatten(1)
    torch.testing.assert_close(seen[0], expected)


def test_weights_are_on_the_grid_when_only_scales_are_learned(run, monkeypatch):
    seen, real = [], UnitRun.finish

    def watch(self, bar):
        layers = [layer for layer in self._layers if layer.weight_quantizer.bits == 2]
        seen.extend(layer.weight.unique().numel() <= 4 * len(layer.weight) for layer in layers)
        real(self, bar)

    monkeypatch.setattr(UnitRun, "finish", watch)
    run(Recipe(stages=(Stage(activation_scales=True),)), iters=2)
    assert len(seen) == 5 and all(seen)


def test_corrected_inputs_are_what_is_mixed_in_and_what_the_target_comes_from(run, monkeypatch):
    seen, real = {}, UnitRun.steps

    def watch(self):
        seen[self.unit.name] = self.data
        with torch.no_grad():
            target = self.fp_module(self.data.fp_input.tensor)
            target = target if self.activation is None else self.activation(target)
        torch.testing.assert_close(self.data.target.tensor, target)
        yield from real(self)

    monkeypatch.setattr(UnitRun, "steps", watch)
    run(replace(QDROP, correction=Correction(closeness=1.0, steps=5, lr=0.05)), iters=2)
    assert not torch.equal(seen["conv1"].fp_input.tensor, seen["conv1"].input.tensor)
    torch.testing.assert_close(seen["conv1"].input.tensor, images(40))
    assert (seen["conv1"].fp_input.tensor - images(40)).abs().mean() > 0.01


@pytest.mark.parametrize(
    ("iters", "within"), [(1, [0, 1]), (50, [0, 49, 50]), (101, [0, 50, 100, 101])], ids=["1", "50", "101"]
)
@pytest.mark.parametrize("recipe", [QDROP, RECIPES["brecq"]], ids=["qdrop", "brecq"])
def test_progress_counts_every_step_once(run, monkeypatch, recipe, iters, within):
    shown, bars = [], []

    class Bar(engine.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

        def update(self, n=1):
            super().update(n)
            shown.append(self.n)

    monkeypatch.setattr(engine, "tqdm", Bar)
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
    seen, real = [], engine._walk

    def watch(job, number):
        seen.append(job.recipe.stages[number].rounding)
        return real(job, number)

    monkeypatch.setattr(engine, "_walk", watch)
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
