"""Networks, weights and transforms of torchvision and timm; nothing is downloaded."""

import sys
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import get_model, list_models, resnet18
from torchvision.transforms import InterpolationMode

from benchmarks import BenchmarkError
from benchmarks.datasets.imagenet import IMAGENET
from benchmarks.networks.catalogue import NETWORKS, TIMM, TORCHVISION, is_timm, one_name
from benchmarks.networks.weights_and_transforms import TIMM_TOP1, load_pretrained, named_outputs, untrained

RESNET18 = "resnet18-f37072fd.pth"  # as torchvision calls the file of IMAGENET1K_V1


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torchvision's cache, empty; a download fails."""

    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_named_weights_come_from_torchvisions_cache(hub, weights):
    planted = resnet18(num_classes=1000).state_dict()
    torch.save(planted, hub / RESNET18)
    before = torch.get_rng_state()
    found = load_pretrained("resnet18", weights, 1000)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, planted[name]) for name, value in found.model.state_dict().items())
    assert not found.model.training
    # As torchvision's documentation says: resized to 256, cut to 224, top-1 69.758.
    assert (found.published, found.source) == (69.758, "torchvision's IMAGENET1K_V1 of resnet18")
    assert (found.transform.resize_size, found.transform.crop_size) == ([256], [224])


def test_second_version_of_weights_has_its_own_transform_and_accuracy(hub):
    planted = get_model("regnet_x_400mf", num_classes=1000).state_dict()
    torch.save(planted, hub / "regnet_x_400mf-62229a5f.pth")
    found = load_pretrained("regnet_x_400mf", "DEFAULT", 1000)
    assert found.source == "torchvision's IMAGENET1K_V2 of regnet_x_400mf"
    assert (found.published, found.transform.resize_size) == (74.864, [232])


class Marker:
    """Restoring one would show that code of the file has run."""

    def __reduce__(self):
        return (pytest.fail, ("code of a weights file was run",))


def test_code_in_the_cache_is_not_run(hub):
    torch.save({"fc.weight": Marker()}, hub / RESNET18)
    with pytest.raises(BenchmarkError, match="IMAGENET1K_V1 of resnet18 could not be downloaded or read"):
        load_pretrained("resnet18", "DEFAULT", 1000)


def test_failed_download_says_what_to_do(hub):
    with pytest.raises(BenchmarkError) as error:
        load_pretrained("resnet18", "DEFAULT", 1000)
    assert "(<urlopen error no network>); download them elsewhere and give the file by --weights FILE" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_outputs_of_named_weights_are_known_before_they_are_there(hub):
    pytest.importorskip("timm")
    named = [("resnet18", "DEFAULT"), ("deit_tiny_patch16_224", "DEFAULT"), ("deit_tiny_patch16_224", "fb_in1k")]
    assert [named_outputs(*each) for each in named] == [1000] * 3
    assert named_outputs("timm/vit_base_patch16_224.augreg_in21k", "DEFAULT") == 21843
    with pytest.raises(BenchmarkError, match=r"dinov2.* has no outputs for classes; give weights of a network that"):
        named_outputs("timm/vit_base_patch14_dinov2", "DEFAULT")
    for call in (named_outputs, lambda *names: load_pretrained(*names, 1000)):
        with pytest.raises(BenchmarkError, match=r"timm has no weights 'foo' of resnet18; it has .*a1_in1k"):
            call("timm/resnet18.foo", "DEFAULT")
    others = [("resnet18", "random"), ("resnet18", "a.pt"), ("deit_tiny_patch16_224", "a.pt"), ("resnet20", "DEFAULT")]
    assert [named_outputs(*each) for each in others] == [None] * 4


@pytest.mark.parametrize(
    ("name", "resize", "mean"),
    [
        ("resnet18", 256, 0.485),
        ("mnasnet1_0", 256, 0.485),  # loads nothing without the versions of its layers
        ("regnet_x_400mf", 256, 0.485),  # its DEFAULT weights have 232
        ("deit_tiny_patch16_224", 248, 0.485),
        ("vit_tiny_patch16_224", 248, 0.5),
        ("regnetx_006", 256, 0.485),
    ],
)
def test_file_gives_weights_and_the_network_its_transform(tmp_path, name, resize, mean):
    state = untrained(name, 4, seed=5).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    found = load_pretrained(name, str(tmp_path / "weights.safetensors"), 4)
    assert all(torch.equal(value, state[key]) for key, value in found.model.state_dict().items())
    assert found.published is None
    if is_timm(name):
        scale, crop, _, normalise = found.transform.transforms
        assert (scale.size, crop.size, normalise.mean[0].item()) == (resize, (224, 224), pytest.approx(mean))
        assert scale.interpolation == InterpolationMode.BICUBIC
    else:
        assert (found.transform.resize_size, found.transform.mean[0]) == ([resize], mean)


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_patch16_224"])
def test_file_says_how_many_outputs_its_network_has(tmp_path, name):
    if is_timm(name):
        pytest.importorskip("timm")
    state = untrained(name, 5).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    model = load_pretrained(name, str(tmp_path / "weights.safetensors"), 4).model
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "parallel.pt")
    assert load_pretrained(name, str(tmp_path / "parallel.pt"), 1000).model(torch.zeros(1, 3, 224, 224)).shape == (1, 5)


def test_file_that_differs_in_more_than_outputs_is_refused(tmp_path):
    state = untrained("resnet18", 5).state_dict()
    save_file(state | {"bn1.bias": torch.zeros(9)}, tmp_path / "weights.safetensors")
    with pytest.raises(
        BenchmarkError,
        match=r"does not fit the ResNet; wrong shape: bn1.bias \(9,\) .*, fc.weight \(5, 512\) instead of",
    ):
        load_pretrained("resnet18", str(tmp_path / "weights.safetensors"), 4)
    save_file(state | {"fc.bias": torch.tensor(0.0)}, tmp_path / "weights.safetensors")
    with pytest.raises(BenchmarkError, match=r"fc.bias \(\) instead of \(4,\)"):
        load_pretrained("resnet18", str(tmp_path / "weights.safetensors"), 4)
    save_file(untrained("resnet20", 4).state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(BenchmarkError, match=r"missing: .* more; unexpected: .* weights of another network\?"):
        load_pretrained("resnet18", str(tmp_path / "weights.safetensors"), 4)


@pytest.mark.parametrize(
    ("name", "known"),
    [("resnet50", "DEFAULT, IMAGENET1K_V1, IMAGENET1K_V2"), ("deit_tiny_patch16_224", "DEFAULT, fb_in1k")],
)
def test_unknown_weights_are_refused_with_those_that_there_are(name, known):
    with pytest.raises(
        BenchmarkError,
        match=f"no such weights file: IMAGENET1K_V3; weights of {name} .*: {known}.*; else expected .*, or random",
    ):
        load_pretrained(name, "IMAGENET1K_V3", 1000)


def test_timm_downloads_its_default_weights(monkeypatch):
    timm = pytest.importorskip("timm")
    asked, create = [], timm.create_model

    def planted(name, pretrained):
        asked.append((name, pretrained))
        return create(name, pretrained=False)

    monkeypatch.setattr(timm, "create_model", planted)
    for weights in ("DEFAULT", "fb_in1k"):
        found = load_pretrained("deit_tiny_patch16_224", weights, 1000)
        assert (found.source, found.published) == ("timm's deit_tiny_patch16_224.fb_in1k", 72.172)
    assert asked == [("deit_tiny_patch16_224.fb_in1k", True)] * 2

    def fail(name, pretrained):
        raise LookupError("the hub is\nnot there")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(BenchmarkError, match=r"deit_tiny_patch16_224.fb_in1k could not be .* \(the hub is\); download"):
        load_pretrained("deit_tiny_patch16_224", "DEFAULT", 1000)


def test_timm_is_only_needed_for_its_own_networks(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert untrained("resnet18", 2).fc.out_features == 2
    for call in (untrained, lambda name, classes: load_pretrained(name, "DEFAULT", classes)):
        with pytest.raises(
            BenchmarkError, match=r"timm cannot be imported .* pip install '\.\[imagenet\]' installs it"
        ):
            call("deit_tiny_patch16_224", 2)


@pytest.mark.parametrize("name", ["timm/test_resnet.r160_in1k", "torchvision/squeezenet1_1"])
def test_any_network_of_either_library_has_its_own_transform(name):
    if name.startswith("timm"):
        timm = pytest.importorskip("timm")
        config = timm.get_pretrained_cfg("test_resnet")
    before = torch.get_rng_state()
    found = load_pretrained(name, "random", 5)
    assert torch.equal(torch.get_rng_state(), before)
    image = found.transform(Image.new("RGB", (300, 400)))
    size = config.input_size if name.startswith("timm") else (3, 224, 224)
    assert tuple(image.shape) == size and found.model(image[None]).shape == (1, 5)
    assert (found.source, found.published) == ("random", None)


def test_one_network_has_one_name():
    assert [one_name(name) for name in ("torchvision/resnet18", "timm/regnetx_006", "resnet50")] == [
        "resnet18",
        "regnetx_006",
        "resnet50",
    ]
    assert one_name("timm/resnet18") == "timm/resnet18"  # another network than torchvision's


def test_network_that_torchvision_does_not_know_is_refused():
    with pytest.raises(BenchmarkError, match=r"torchvision \S+ has no network 'resnet19'; did you mean resnet1"):
        load_pretrained("torchvision/resnet19", "random", 1000)


def test_network_that_timm_does_not_know_is_refused():
    with pytest.raises(BenchmarkError, match=r"timm \S+ has no network 'deit_huge_9'; did you mean davit_huge"):
        load_pretrained("deit_huge_9", "DEFAULT", 1000)


def test_every_network_exists():
    timm = pytest.importorskip("timm")
    assert NETWORKS[IMAGENET.name] == (*TORCHVISION, *TIMM)
    assert set(TORCHVISION) <= set(list_models())
    assert all(map(is_timm, TIMM)) and all(map(timm.is_model, TIMM)) and not any(map(is_timm, TORCHVISION))
    assert {f"{name}.{timm.get_pretrained_cfg(name).tag}" for name in TIMM} <= set(TIMM_TOP1)
    assert all(timm.is_model(name.partition(".")[0]) for name in TIMM_TOP1)


def test_seed_decides_on_random_weights():
    first, again, other = (untrained("mnasnet1_0", 3, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
