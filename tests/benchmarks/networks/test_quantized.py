import shutil
from itertools import count

import pytest
import torch

from baselines.reconstruction.unit_run import UnitRun
from benchmarks import BenchmarkError
from benchmarks.networks import quantized
from benchmarks.networks.quantized import quantized_model, timed_quantized_model
from benchmarks.networks.weights_and_transforms import untrained

OPTIONS = {"method": "qdrop", "w_bits": 2, "a_bits": 2, "iters": 2, "batch_size": 8, "seed": 0}


@pytest.fixture(scope="module")
def model():
    return untrained("resnet8", 10, seed=1).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def made(monkeypatch):
    """The methods of all quantizations that were really made."""
    methods, real = [], quantized.quantize

    def spy(*args, **options):
        methods.append(options["method"])
        return real(*args, **options)

    monkeypatch.setattr(quantized, "quantize", spy)
    return methods


def test_cached_network_is_the_same_and_not_made_again(model, images, made, tmp_path):
    first = quantized_model(model, images, tmp_path, **OPTIONS)
    second = quantized_model(model, images, tmp_path, **OPTIONS)
    assert made == ["qdrop", "rtn"]
    assert torch.equal(first(images), second(images))
    assert torch.equal(first(images), quantized_model(model, images, **OPTIONS)(images))


def test_network_that_insists_on_versions_of_its_state_comes_from_the_cache(made, tmp_path, caplog):
    """torchvision's MNASNet does; safetensors files hold none."""
    network, images = untrained("mnasnet1_0", 3).eval(), torch.randn(4, 3, 32, 32)
    options = {"method": "rtn", "w_bits": 4, "a_bits": 4, "batch_size": 4, "range_method": "minmax"}
    first = quantized_model(network, images, tmp_path, **options)
    assert torch.equal(first(images), quantized_model(network, images, tmp_path, **options)(images))
    assert not caplog.text


def test_seconds_are_those_of_when_it_was_made(model, images, tmp_path, monkeypatch):
    ticks = count(0.0, 2.5)
    monkeypatch.setattr(quantized, "clock", lambda device: next(ticks))
    assert timed_quantized_model(model, images, **OPTIONS)[1] == 2.5
    assert [timed_quantized_model(model, images, tmp_path, **OPTIONS)[1] for _ in range(2)] == [2.5, 2.5]
    shutil.rmtree(tmp_path / "quantized-seconds")  # as versions that kept no time left it
    assert timed_quantized_model(model, images, tmp_path, **OPTIONS)[1] is None


@pytest.mark.parametrize("change", ["option", "images", "weights", "version"])
def test_any_change_makes_a_new_network(model, images, made, tmp_path, monkeypatch, change):
    quantized_model(model, images, tmp_path, **OPTIONS)
    if change == "weights":
        model = untrained("resnet8", 10, seed=2).eval()
    if change == "version":
        monkeypatch.setattr(quantized, "result_version", lambda method: "other")
    images = images + 1 if change == "images" else images
    quantized_model(model, images, tmp_path, **(OPTIONS | ({"seed": 1} if change == "option" else {})))
    assert made == ["qdrop", "qdrop"]


def test_truncated_file_is_replaced(model, images, made, tmp_path, caplog):
    quantized_model(model, images, tmp_path, **OPTIONS)
    (path,) = (tmp_path / "quantized").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    quantized_model(model, images, tmp_path, **OPTIONS)
    assert "the cached network is unusable" in caplog.text
    assert path.read_bytes() == whole


def test_stopped_quantization_goes_on_at_the_unit_where_it_was_stopped(model, images, tmp_path, monkeypatch):
    seen, real = [], UnitRun.finish

    def finish(self, bar):
        seen.append(self.unit.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(self, bar)

    monkeypatch.setattr(UnitRun, "finish", finish)
    with pytest.raises(KeyboardInterrupt):
        quantized_model(model, images, tmp_path, **OPTIONS)
    network, seconds = timed_quantized_model(model, images, tmp_path, **OPTIONS)
    assert seconds is None, "a part of it was made before"
    assert seen == ["conv1", "layer1.0", "layer2.0", "layer2.0", "layer3.0", "fc"]
    assert [path.suffix for path in (tmp_path / "quantized").iterdir()] == [".safetensors"]
    assert torch.equal(network(images), quantized_model(model, images, **OPTIONS)(images))


def test_place_of_the_cache_makes_no_other_network(model, images, made, tmp_path):
    first = quantized_model(model, images, tmp_path, cache_device="cpu", **OPTIONS)
    second = quantized_model(model, images, tmp_path, **OPTIONS)
    assert made == ["qdrop", "rtn"]
    assert torch.equal(first(images), second(images))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", [ValueError, FloatingPointError])
def test_what_quantize_refuses_is_an_error_of_the_user(model, images, tmp_path, monkeypatch, kind, cached):
    def refuse(*args, **options):
        raise kind("the loss of layer1 is nan at step 3")

    monkeypatch.setattr(quantized, "quantize", refuse)
    with pytest.raises(BenchmarkError, match="cannot be quantized by qdrop W2A2: the loss of layer1 is nan") as error:
        quantized_model(model, images, tmp_path if cached else None, **OPTIONS)
    assert isinstance(error.value.__cause__, kind)
    assert not (tmp_path / "quantized").exists()


def test_other_errors_go_through(model, images, tmp_path, monkeypatch):
    def confuse(*args):
        raise ValueError("a mistake of the programmer")

    monkeypatch.setattr(quantized, "cache_key", confuse)
    with pytest.raises(ValueError, match="a mistake") as error:
        quantized_model(model, images, tmp_path, **OPTIONS)
    assert not isinstance(error.value, BenchmarkError)
