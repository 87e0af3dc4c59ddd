import pytest
import torch

from cat_plugin.fitting.processes import ALONE
from cat_plugin.kinds import SOFTMAX
from cat_plugin.layers.descent import Descent, Schedule
from cat_plugin.layers.gradients import fitting_through
from tests.cat_plugin.layers.networks import kept_images, pictures, planted
from tests.cat_plugin.layers.test_network import made

IMAGES = 24


def fitted(schedule, images=IMAGES, batches=(10, 14), divergence=SOFTMAX.divergence, network=None, **options):
    """The vector for so many images, and the network."""
    model, fp = planted()
    x = pictures(images)
    network = made(model, x)[0] if network is None else network(made(model, x)[0])
    with torch.no_grad():
        f = fp(x)
    with fitting_through(model), network.attached():
        descent = Descent(
            network, kept_images(x.split(batches)), lambda part: f[part.images], divergence, ALONE, **options
        )
        return descent.fit(torch.arange(images), schedule, "far", seed=0), network


def loss(network, vector, seed=0):
    """Mean divergence by the book: KL(FP || outputs)."""
    x = pictures(IMAGES, seed)
    (part,) = kept_images([x]).parts(torch.arange(IMAGES))
    with torch.no_grad():
        p = planted()[1](x).softmax(1)
    with network.attached():
        return (p * (p.log() - network.rows(part, vector).log_softmax(1))).sum(1).mean()


def test_first_step_goes_against_the_gradient():
    """Adam's first step is as long for every number; that of all images in one step is that of their mean."""
    vector, network = fitted(Schedule(1, 1))
    probe = torch.zeros(network.size, requires_grad=True)
    with fitting_through(network.model):
        (gradient,) = torch.autograd.grad(loss(network, probe), probe)
    clear = gradient.abs() > 1e-4
    assert clear.double().mean() > 0.7
    torch.testing.assert_close(vector[clear] / vector.abs().max(), -gradient[clear].sign(), rtol=0, atol=1e-2)


def test_the_divergence_falls():
    vector, network = fitted(Schedule(20, 2))
    with torch.no_grad():
        assert loss(network, vector) < 0.6 * loss(network, torch.zeros(network.size))


@pytest.mark.parametrize("options", [{"batches": 1}, {"batches": 24}, {"micro_batch": 5}, {"micro_batch": 1}], ids=str)
def test_how_images_came_and_how_many_are_run_at_a_time_does_not_matter(options):
    expected, _ = fitted(Schedule(2, 2))
    vector, _ = fitted(Schedule(2, 2), **options)
    torch.testing.assert_close(vector, expected, rtol=0, atol=1e-4)


def test_where_memory_ends_fewer_images_are_run_at_a_time():
    largest = []

    def small(network):
        rows = network.rows

        def limited(part, vector):
            if len(part.images) > 3:
                raise torch.OutOfMemoryError
            largest.append(len(part.images))
            return rows(part, vector)

        network.rows = limited
        return network

    vector, _ = fitted(Schedule(2, 2), network=small)
    assert max(largest) <= 3
    torch.testing.assert_close(vector, fitted(Schedule(2, 2))[0], rtol=0, atol=1e-4)


def test_no_memory_at_all():
    def none(network):
        def fails(part, vector):
            raise torch.OutOfMemoryError("no memory")

        network.rows = fails
        return network

    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        fitted(Schedule(1, 1), network=none)


def test_views_have_outputs_of_their_own():
    """Given the same views, those of the images themselves are not asked for."""
    model, fp = planted()
    x, shift = pictures(IMAGES), 0.5
    network = made(model, x)[0]

    def targets(part):
        with torch.no_grad():
            return fp(part.batch)

    found = []
    for batch, augment in ((x, lambda images: images + shift), (x + shift, None)):
        with fitting_through(model), network.attached():
            descent = Descent(network, kept_images([batch]), targets, SOFTMAX.divergence, ALONE, augment)
            found.append(descent.fit(torch.arange(IMAGES), Schedule(2, 2), "far", seed=0))
    assert torch.equal(*found)


def test_seed_decides():
    model, x = planted()[0], pictures(IMAGES)
    network = made(model, x)[0]
    found = []
    for seed in (0, 0, 1):
        with fitting_through(model), network.attached():
            descent = Descent(
                network, kept_images([x]), lambda part: planted()[1](part.batch).detach(), SOFTMAX.divergence, ALONE
            )
            found.append(descent.fit(torch.arange(IMAGES), Schedule(2, 3), "far", seed=seed))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_steps_that_are_not_finite_are_left_out(caplog):
    vector, _ = fitted(Schedule(1, 2), divergence=lambda f, out: out.sum(1) * torch.nan)
    assert vector.abs().max() == 0
    assert "2 of 2 steps were left out, since their gradients were not finite" in caplog.text


def test_a_fit_in_half_precision_knows_nothing_of_one_that_failed_before():
    """Whose steps were all left out, each of which halves what gradients are scaled by."""
    model, fp = (each.half() for each in planted())
    x = pictures(IMAGES).half()
    network, broken = made(model, x)[0], [False]

    def divergence(f, out):
        return SOFTMAX.divergence(f, out) * (torch.nan if broken[0] else 1.0)

    with fitting_through(model), network.attached(), torch.no_grad():
        targets = fp(x)
    with fitting_through(model), network.attached():
        descent = Descent(network, kept_images([x]), lambda part: targets[part.images], divergence, ALONE)
        found = []
        for broken[0] in (False, True, False):
            found.append(descent.fit(torch.arange(IMAGES), Schedule(20, 2), "far", seed=0))
    assert found[1].abs().max() == 0 and torch.equal(found[0], found[2])
    assert found[0].abs().max() > 0.1


class CastsItself(torch.nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.float16):
            return super().forward(x)


@pytest.mark.parametrize("own", [False, True], ids=["caller", "model"])
def test_small_gradients_are_not_lost_in_mixed_precision(own):
    """Of the first layer they are some 1e-8, for which half precision has no number."""
    torch.manual_seed(0)
    first, second, x = torch.nn.Linear(8, 8), torch.nn.Linear(8, 5), torch.randn(IMAGES, 8)
    with torch.no_grad():
        first.weight.mul_(1e4)
        second.weight.mul_(1e-4)
    model = (CastsItself if own else torch.nn.Sequential)(first, second)
    network = made(model, x)[0]
    with torch.no_grad():
        f = model(x) + 1e-4 * torch.randn(IMAGES, 5)
    with fitting_through(model), network.attached(), torch.autocast("cpu", torch.float16, enabled=not own):
        descent = Descent(network, kept_images([x]), lambda part: f[part.images], SOFTMAX.divergence, ALONE)
        vector = descent.fit(torch.arange(IMAGES), Schedule(1, 1), "far", seed=0)
    scales = vector[: len(first.bias)]
    assert (scales != 0).all()


def test_callers_hear_of_steps_and_epochs():
    model, x = planted()[0], pictures(IMAGES)
    network = made(model, x)[0]
    steps, epochs = [], []
    with fitting_through(model), network.attached():
        descent = Descent(network, kept_images([x]), lambda part: torch.zeros(1, 5), SOFTMAX.divergence, ALONE)
        vector = descent.fit(
            torch.arange(IMAGES), Schedule(3, 2), "far", 0, lambda v: epochs.append(v.clone()), lambda: steps.append(1)
        )
    assert len(steps) == 6 and len(epochs) == 3 and torch.equal(epochs[-1], vector)
    assert not torch.equal(epochs[0], epochs[1])
