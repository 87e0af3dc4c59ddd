from collections import namedtuple

import pytest
import torch

from baselines.network.batch_norm_folding import folded_copy
from baselines.network.blocks import find_blocks
from baselines.network.trace import trace
from baselines.network.units import find_units
from baselines.reconstruction.cache import Cached, CachePlan
from baselines.reconstruction.losses import prediction_difference
from baselines.reconstruction.rest_of_network import RestOfNetwork, fisher_weights, prediction_of, predictions
from baselines.reconstruction.streams import Stream

from ..networks import LongSkip, SmallResNet, images, randomized

CPU = torch.device("cpu")
PLAN = CachePlan(CPU, None, CPU)


def rests(model, inputs, kind="block"):
    """For each unit: its name, its output, and the rest of the network behind it."""
    network = folded_copy(model, inputs[:2])
    record = trace(network, inputs[:2])
    cached = Cached(inputs, PLAN)
    stream, passed = Stream(network, cached, 4), []
    for unit in find_units(network, record, find_blocks(network, record), kind):
        output = stream.leave(unit, stream.arrive(unit))
        if unit.activation:
            output = output.mapped(network.get_submodule(unit.activation), 4)
        rest = RestOfNetwork(network, cached, unit, list(passed))
        rest.check(output)
        passed.append((unit.name, output.tensor.shape[1:]))
        yield unit, output.tensor, rest, network


@pytest.mark.parametrize("model", [SmallResNet, LongSkip])
@pytest.mark.parametrize("kind", ["block", "layer"])
def test_behind_every_unit_the_rest_of_the_network_predicts_what_the_whole_does(model, kind):
    model, inputs = randomized(model()), images(9)
    chosen = torch.tensor([7, 0, 3])
    with torch.no_grad():
        expected = model(inputs)
    names = []
    for unit, output, rest, network in rests(model, inputs, kind):
        torch.testing.assert_close(rest(output[chosen], chosen), expected[chosen], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(predictions(network, Cached(inputs, PLAN), 4), expected, rtol=1e-4, atol=1e-5)
        names.append(unit.name)
    assert len(names) > 3


def test_units_before_do_not_run_and_nothing_stays_replaced():
    inputs, ran = images(6), []

    def count(module, args):
        if isinstance(module, torch.nn.Conv2d) and "forward" not in vars(module):
            ran.append(module)

    convolutions = []
    for _, output, rest, network in rests(randomized(SmallResNet()), inputs):
        handles = [module.register_forward_pre_hook(count) for module in network.modules()]
        ran.clear()
        rest(output, torch.arange(6))
        convolutions.append(len(ran))
        for handle in handles:
            handle.remove()
        assert not any("forward" in vars(module) for module in network.modules())
    assert convolutions == [5, 3, 0, 0]


def test_gradient_through_the_rest_is_that_of_the_whole_network():
    inputs = images(5)
    for unit, output, rest, network in rests(randomized(SmallResNet()), inputs):
        mine = output.clone().requires_grad_()
        prediction_of(rest(mine, torch.arange(5))).square().sum().backward()
        reached = []
        handle = network.get_submodule(unit.activation or unit.name).register_forward_hook(
            lambda module, args, value, reached=reached: reached.append(value.requires_grad_()) or value * 1
        )
        network(inputs).square().sum().backward()
        handle.remove()
        torch.testing.assert_close(mine.grad, reached[0].grad)


def test_prediction_difference_is_the_divergence_written_out():
    prediction, fp_prediction = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    expected = 0.0
    for q, f in zip(prediction.tolist(), fp_prediction.tolist(), strict=True):
        p, r = (torch.tensor([value / 4.0 for value in row]).softmax(0).tolist() for row in (f, q))
        expected += sum(a * (torch.tensor(a).log() - torch.tensor(b).log()).item() for a, b in zip(p, r, strict=True))
    assert prediction_difference(prediction, fp_prediction, 4.0).item() == pytest.approx(expected / 3, rel=1e-4)
    assert prediction_difference(fp_prediction, fp_prediction, 4.0).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("form", ["dict", "tuple", "nested"])
def test_predictions_are_called_logits_or_come_first(form):
    loss, logits = torch.zeros(()), torch.ones(2, 3)
    outputs = {
        "dict": {"loss": loss, "logits": logits},
        "tuple": namedtuple("Output", "loss logits")(loss, logits),
        "nested": ([logits], loss),
    }
    assert prediction_of(outputs[form]) is logits


class SharedActivation(torch.nn.Module):
    """One activation module behind every layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU()
        self.fc = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.relu(self.b(self.relu(self.a(x)))).mean((2, 3)))


def test_an_activation_that_serves_several_units_is_replaced_behind_one_only():
    model, inputs = randomized(SharedActivation()), images(5)
    with torch.no_grad():
        expected = model(inputs)
    activations = []
    for unit, output, rest, _ in rests(model, inputs):
        torch.testing.assert_close(rest(output, torch.arange(5)), expected)
        activations.append(unit.activation)
    assert activations == ["relu", "relu", None]


def test_fisher_weights_are_squared_gradients_image_by_image():
    inputs = images(5)
    for unit, output, rest, network in rests(randomized(SmallResNet()), inputs):
        rough = (output * 4).round() / 4
        prediction = network(inputs)
        mine = fisher_weights(rest, lambda x: x, Cached(rough, PLAN), prediction, 2).tensor
        expected = []
        for index in range(5):  # the whole network, with the rough output put in by a hook
            value = rough[index : index + 1].clone().requires_grad_()
            where = network.get_submodule(unit.activation or unit.name)
            handle = where.register_forward_hook(lambda module, args, out, value=value: value)
            predicted = network(inputs[index : index + 1]).log_softmax(1)
            handle.remove()
            p = prediction[index : index + 1].softmax(1)
            ((p.log() - predicted) * p).sum().backward()
            expected.append(value.grad**2)
        expected = torch.cat(expected)
        torch.testing.assert_close(mine, expected / expected.mean(), rtol=1e-3, atol=1e-4)


def test_outputs_that_are_no_scores_of_classes_are_a_clear_error():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 8), torch.nn.Flatten(0))
    with pytest.raises(ValueError, match=r"outputs, \(6,\) of torch.float32, are no class scores"):
        predictions(network, Cached(images(6), PLAN), 4)


class Unseen(torch.nn.Module):
    """No gradient comes back to the first layer, and none of what ``aside`` gives reaches the prediction."""

    def __init__(self):
        super().__init__()
        self.a, self.aside, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3), torch.nn.Linear(4, 3)

    def forward(self, x):
        x = self.a(x).detach()
        aside = self.aside(x)
        return self.fc(x.mean((2, 3))), aside


def test_gradient_that_does_not_come_back_is_a_clear_error_only_where_there_should_be_one():
    units = rests(randomized(Unseen()), images(6))
    with pytest.raises(
        ValueError, match=r"no gradient comes back to a from the outputs of Unseen, .* take torch.no_gr"
    ):
        next(units)
    model = randomized(Unseen())
    model.a = torch.nn.Sequential()  # not a unit
    model.aside = torch.nn.Conv2d(3, 4, 3)
    model.fc = torch.nn.Linear(3, 3)
    units = {unit.name: (output, rest) for unit, output, rest, _ in rests(randomized(model), images(6))}
    assert list(units) == ["aside", "fc"]
    output, rest = units["aside"]
    weights = fisher_weights(rest, lambda x: x, Cached(output, PLAN), torch.randn(6, 3), 4)
    assert weights.tensor.unique().tolist() == [1]
