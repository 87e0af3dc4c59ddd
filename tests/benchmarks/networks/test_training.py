from dataclasses import replace

import pytest
import torch

from benchmarks import BenchmarkError
from benchmarks.datasets.digits import load_digits
from benchmarks.measure.accuracy import top1
from benchmarks.networks import training
from benchmarks.networks.training import Training, trained_model
from benchmarks.networks.weights_and_transforms import untrained

SHORT = Training(epochs=1)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture
def trainings(monkeypatch):
    """Counts how often a network is trained."""
    calls, real = [], training.train
    monkeypatch.setattr(training, "train", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs)))
    return calls


def same(first, second):
    return all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


def test_network_is_trained_once_and_then_read(digits, tmp_path, trainings):
    first = trained_model("resnet8", digits, tmp_path, SHORT)
    again = trained_model("resnet8", digits, tmp_path, SHORT)
    assert len(trainings) == 1
    assert same(first, again)
    assert not again.training
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_training_is_deterministic_and_leaves_the_random_state_alone(digits, tmp_path):
    before = torch.get_rng_state()
    assert same(*(trained_model("resnet8", digits, tmp_path / name, SHORT) for name in ("a", "b")))
    assert torch.equal(before, torch.get_rng_state())


def test_recipe_of_the_transformer_trains_a_network(digits):
    recipe = replace(training.RECIPES["vit"], epochs=4, batch_size=32, max_shift=1, mirror=False)
    model = untrained("resnet8", 10)
    training.train(model, digits.train_images, digits.train_labels, recipe)
    with torch.no_grad():
        assert top1(model(digits.test_images).argmax(1), digits.test_labels) > 90


def test_several_processes_do_not_each_train_what_takes_long(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    images = torch.zeros(20, 3, 32, 32)
    few = replace(digits, train_images=images, train_labels=torch.zeros(20, dtype=torch.long))
    with pytest.raises(BenchmarkError, match="without torchrun"):
        trained_model("vit", few, tmp_path)


def test_some_images_are_mirrored_where_the_recipe_says_so():
    class Watch(torch.nn.Linear):
        def forward(self, images):
            self.seen = images
            return super().forward(images.flatten(1))

    images = torch.arange(8.0).expand(40, 1, 1, 8).clone()  # rising to the right
    for mirror in (False, True):
        model = Watch(8, 2)
        recipe = Training(epochs=1, batch_size=40, max_shift=0, mirror=mirror)
        training.train(model, images, torch.zeros(40, dtype=torch.long), recipe)
        falling = (model.seen[:, 0, 0, 0] > model.seen[:, 0, 0, -1]).sum()
        assert falling == 0 if not mirror else 5 < falling < 35


def test_truncated_cache_file_is_replaced(digits, tmp_path, trainings, caplog):
    first = trained_model("resnet8", digits, tmp_path, SHORT)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    again = trained_model("resnet8", digits, tmp_path, SHORT)
    assert len(trainings) == 2
    assert "the cached network is unusable" in caplog.text
    assert same(first, again)
    trained_model("resnet8", digits, tmp_path, SHORT)
    assert len(trainings) == 2


def test_cache_knows_recipe_and_training_images_but_not_test_images(digits, tmp_path, trainings):
    trained_model("resnet8", digits, tmp_path, SHORT)
    trained_model("resnet8", digits, tmp_path, replace(SHORT, seed=1))
    trained_model("resnet8", replace(digits, train_images=digits.train_images + 1e-3), tmp_path, SHORT)
    assert len(trainings) == 3
    trained_model("resnet8", replace(digits, test_images=digits.test_images * float("nan")), tmp_path, SHORT)
    assert len(trainings) == 3


def test_digits_are_learned(digits, tmp_path):
    model = trained_model("resnet8", digits, tmp_path, replace(SHORT, epochs=8))
    with torch.no_grad():
        assert top1(model(digits.test_images).argmax(1), digits.test_labels) > 96
