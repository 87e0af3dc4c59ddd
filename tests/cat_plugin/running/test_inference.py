import random

import numpy as np
import pytest
import torch
from torch import nn

from cat_plugin import CATError, apply_cat
from cat_plugin.running.digests import state_digests
from cat_plugin.running.inference import inference, seed_devices
from tests.cat_plugin.helpers import SmallNet, images, state_of


def model_with_mixed_modes():
    model = SmallNet().train()
    model.norm.eval()
    model.last.weight.requires_grad_(False)
    model(images()).sum().backward()
    return model


@pytest.mark.parametrize("fails", [False, True], ids=["normal", "raises"])
def test_state_comes_back(fails):
    model = model_with_mixed_modes()
    before = state_of(model)
    try:
        with inference({"model": model}):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            random.random(), np.random.rand(), torch.rand(3)
            if fails:
                raise KeyError("from the body")
    except KeyError:
        assert fails
    assert state_of(model) == before
    assert torch.is_grad_enabled()


def test_module_that_refuses_eval():
    class Refusing(SmallNet):
        def train(self, mode=True):
            raise NotImplementedError("as graph modules of pt2e do")

    model = Refusing()
    with inference({"model": model}):
        assert not model.drop.training
    assert model.training
    assert model.drop.training


class Follows(nn.Module):
    """Its flag is what another module has, so it cannot be set."""

    def __init__(self, leader):
        super().__init__()
        self.__dict__["leader"] = leader

    @property
    def training(self):
        return self.leader.training

    @training.setter
    def training(self, mode):
        if "leader" in self.__dict__:  # `Module.__init__` sets it
            raise AttributeError("follows its leader")


@pytest.mark.parametrize("order", [1, -1], ids=["leader first", "leader last"])
def test_module_whose_flag_follows_another(order):
    leader = SmallNet()
    model = nn.Sequential(*[leader, Follows(leader)][::order])
    with inference({"lq": model}):
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


def test_module_that_stays_in_training_mode():
    model, follower = nn.Sequential(nn.ReLU(), Follows(SmallNet())), nn.Module()
    message = r"1 of lq, a Follows, cannot be set to evaluation mode \(follows its leader\)"
    with pytest.raises(CATError, match=message), inference({"fp": follower, "lq": model}):
        pytest.fail("the body was run")
    assert all(module.training for module in (*model.modules(), follower))
    model[1].leader.eval()
    with inference({"lq": model}):
        assert not model[0].training


def test_modules_in_evaluation_mode_are_not_touched():
    class Recording(SmallNet):
        def __setattr__(self, name, value):
            if name == "training":
                self.__dict__.setdefault("seen", []).append(value)
            super().__setattr__(name, value)

    model = Recording().eval()
    model.seen.clear()
    with inference({"model": model}):
        model(images())
    assert model.seen == []


class MergesInEval(SmallNet):
    """Folds weights when its mode changes, as re-parametrised networks and adapters do."""

    def train(self, mode=True):
        if not mode:
            self.first.weight.data.mul_(2)
        return super().train(mode)


@pytest.mark.parametrize("mode", [True, False])
def test_own_train_is_not_called(mode):
    model = MergesInEval()
    model.training = mode
    before = state_of(model)
    with inference({"model": model}):
        model(images())
    assert state_of(model) == before


def test_attaching_copies_and_traces_nothing():
    class Refusing(SmallNet):
        def __deepcopy__(self, memo):
            raise NotImplementedError("as frozen models of optimum-quanto do")

        def forward(self, x):
            return super().forward(x) if float(x.sum()) < 1e9 else x  # control flow that no tracer takes

        def train(self, mode=True):
            raise NotImplementedError("as graph modules of pt2e do")

    model, fp = Refusing(), SmallNet(seed=1)
    before = state_of(model, fp)
    cat_model = apply_cat(model, fp, images(), eval_loader=[(images(), torch.arange(96) % 10)])
    cat_model.remove()
    assert state_of(model, fp) == before


class Observer(nn.Module):
    """Changes its buffers in each forward pass, in the ways that observers do."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.register_buffer("low", torch.tensor([float("inf")]))
        self.register_buffer("history", torch.zeros(2), persistent=False)
        self.register_buffer("scale", None)

    def forward(self, x):
        if self.kind == "in place":
            self.low.copy_(x.min())
        elif self.kind == "not persistent":
            self.history += 1
        elif self.kind == "resized":
            self.low.resize_(3).fill_(1.0)
        elif self.kind == "replaced":
            self.low = x.min().reshape(1)
        elif self.kind == "set":
            self.scale = torch.ones(1)
        elif self.kind == "added":
            self.register_buffer("late", torch.ones(1))
        return x


CHANGES = {
    "in place": "0.low",
    "not persistent": "0.history",
    "resized": "0.low",
    "replaced": "0.low",
    "set": "0.scale",
    "added": "0.late",
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_buffers_are_named_and_restored(kind):
    model = nn.Sequential(Observer(kind), SmallNet())
    before, low = state_digests(model), model[0].low
    message = f"changed {CHANGES[kind]} of lq; they have been restored. Freeze observers"
    with pytest.raises(CATError, match=message), inference({"lq": model, "fp": SmallNet()}):
        model(images())
    assert state_digests(model) == before
    assert model[0].low is low
    with pytest.raises(KeyError, match="from the body"), inference({"lq": model}):
        model(images())
        raise KeyError("from the body")
    assert state_digests(model) == before


def test_changed_parameter_is_named():
    model = SmallNet()
    with pytest.raises(CATError, match=r"changed last\.bias of fp"), inference({"fp": model}):
        model.last.bias.add_(1.0)


def test_error_of_restoring_does_not_hide_the_first(monkeypatch):
    monkeypatch.setattr("cat_plugin.running.inference._restore", lambda *_: 1 / 0)
    with pytest.raises(KeyError, match="from the body"), inference({"model": SmallNet()}):
        raise KeyError("from the body")


@pytest.mark.parametrize("part", ["weight", "running_var"])
def test_model_without_data_is_refused_before_anything_is_run(part):
    fp, model = SmallNet(), SmallNet()
    tensor = torch.ones(16, device="meta")
    setattr(model.norm, part, nn.Parameter(tensor) if part == "weight" else tensor)
    message = rf"lq has 1 parameters or buffers on the meta device, such as 'norm\.{part}', which hold no data"
    with pytest.raises(CATError, match=message), inference({"fp": fp, "lq": model}):
        pytest.fail("the body was run")
    assert model.training


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and still what users have
def test_traced_model():
    model = torch.jit.trace(SmallNet().eval(), images())
    model.train()
    with inference({"model": model}):
        model(images())
    assert model.training


class Trains(nn.Module):
    """Changes a parameter in every forward pass, in place, by its data, by another shape, or by another object."""

    def __init__(self, how):
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.ones(3))

    def forward(self, x):
        if self.how == "in place":
            self.weight.add_(1)
        elif self.how == "shape":
            self.weight.data = torch.ones(5)
        elif self.how == "object":
            self.weight = nn.Parameter(torch.zeros(3))
        elif self.how == "added":
            self.extra = nn.Parameter(torch.zeros(3))
        return x


@pytest.mark.parametrize("how", ["in place", "shape", "object", "added"])
def test_a_parameter_that_a_forward_pass_changed_comes_back(how):
    model = Trains(how)
    weight = model.weight
    name = "extra" if how == "added" else "weight"
    with pytest.raises(CATError, match=f"changed {name} of lq; they have been restored"), inference({"lq": model}):
        model(torch.ones(2))
    assert model.weight is weight
    assert weight.requires_grad
    assert torch.equal(weight, torch.ones(3))
    assert [name for name, _ in model.named_parameters()] == ["weight"]


def test_tied_parameters_stay_tied():
    model = nn.Sequential(Trains("in place"), nn.Linear(3, 3))
    model[1].bias = model[0].weight
    with pytest.raises(CATError, match=r"0\.weight"), inference({"lq": model}):
        model(torch.ones(2, 3))
    assert model[1].bias is model[0].weight
    assert torch.equal(model[1].bias, torch.ones(3))


class Lazy(nn.Module):
    """A quantizer as in research code: makes its scale at the first batch, in place of a plain attribute."""

    def __init__(self):
        super().__init__()
        self.delta, self.inited = None, False

    def forward(self, x):
        if not self.inited:
            self.delta, self.inited = nn.Parameter(x.abs().max() / 7), True
        return (x / self.delta).round() * self.delta


@pytest.mark.parametrize("fails", [False, True], ids=["refused", "raises"])
def test_what_a_module_remembers_comes_back_with_its_tensors(fails):
    model = nn.Sequential(Lazy(), SmallNet())
    with pytest.raises(KeyError if fails else CATError), inference({"lq": model}):
        model(images())
        if fails:
            raise KeyError
    assert model[0].delta is None and not model[0].inited and not list(model[0].parameters())
    model(images())  # as the error says
    assert model[0].inited and isinstance(model[0].delta, nn.Parameter)


def test_what_others_put_on_modules_meanwhile_stays():
    model = nn.Sequential(Lazy(), SmallNet())
    with pytest.raises(KeyError), inference({"model": model}):
        model(images())
        model[1].seen = [2]
        raise KeyError
    assert model[1].seen == [2] and not model[0].inited


def test_devices_of_the_models_alone_are_seeded(monkeypatch):
    """A GPU that only someone else works on goes on as it was."""
    model, seeded = SmallNet(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: seeded.append(seed))
    expected = torch.Generator().manual_seed(7)
    state = torch.get_rng_state()
    try:
        seed_devices([model], 7)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    finally:
        torch.set_rng_state(state)
    assert not seeded
