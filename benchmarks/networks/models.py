"""The networks that are measured, and loading of weights that come from outside."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, mobilenet_v2
from torchvision.models.resnet import BasicBlock

from benchmarks import BenchmarkError
from benchmarks.networks.checkpoints import KEYS_SHOWN, read_state, without_prefixes
from benchmarks.wording import reason, some

WIDTHS = (16, 32, 64)
# (expansion, channels, repeats, stride) of each stage: torchvision's MobileNetV2 with strides for 32x32 images.
MOBILENETV2_STAGES = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 2, 1], [6, 64, 2, 2], [6, 96, 2, 2], [6, 160, 1, 1]]


class CifarResNet(nn.Module):
    """ResNet for small images (He et al. 2016, section 4.2), `6 * blocks + 2` layers of torchvision's blocks."""

    def __init__(self, blocks: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTHS[2], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, num_classes)` of images `(N, in_channels, height, width)`."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        return self.fc(self.avgpool(features).flatten(1))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    downsample = None
    if stride != 1 or in_channels != channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
        )
    first = BasicBlock(in_channels, channels, stride, downsample)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))


def resnet8(num_classes: int, in_channels: int = 1) -> nn.Module:
    """One block a stage; small enough to be trained on the digits within a minute."""
    return CifarResNet(1, num_classes, in_channels)


def resnet20(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Three blocks a stage, the usual network for CIFAR-10."""
    return CifarResNet(3, num_classes, in_channels)


def mobilenetv2(num_classes: int) -> nn.Module:
    """torchvision's MobileNetV2 of half width with the strides of small images."""
    return mobilenet_v2(
        num_classes=num_classes, width_mult=0.5, dropout=0.0, inverted_residual_setting=MOBILENETV2_STAGES
    )


def vit(num_classes: int) -> nn.Module:
    """torchvision's vision transformer for small images: 6 blocks of 128 channels and 4 heads on patches of 4."""
    return VisionTransformer(
        image_size=32, patch_size=4, num_layers=6, num_heads=4, hidden_dim=128, mlp_dim=256, num_classes=num_classes
    )


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": resnet8,
    "resnet20": resnet20,
    "mobilenetv2": mobilenetv2,
    "vit": vit,
}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load what `read_state` reads, without prefixes such as `module.`.

    Raises:
        BenchmarkError: see `read_state`; or keys or shapes do not fit the network: the message lists the first of them.
    """
    load_read(model, read_state(path), path)


def load_read(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """`load_weights` of a state that was read from `path`."""
    versions, state = getattr(state, "_metadata", None), without_prefixes(state, model.state_dict())
    # Files from before torch 0.4.1 lack these counters, which only training uses.
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    whole = OrderedDict({**counters, **state})
    _refuse_misfit(model, whole, path)
    load_state(model, whole, versions)


def outputs_in(state: Mapping[str, Tensor], model: nn.Module, classes: int) -> int:
    """How many outputs the network had whose weights these are, where `model` is that network with `classes` outputs.

    That is where the two differ; where they differ in something else, it is `classes`.
    """
    wanted = model.state_dict()
    differing = _other_shapes(without_prefixes(state, wanted), wanted).values()
    ours_first = all(
        len(theirs) == len(ours) and theirs[1:] == ours[1:] and ours[0] == classes for theirs, ours in differing
    )
    outputs = {theirs[0] for theirs, _ in differing} if ours_first else set()
    return outputs.pop() if len(outputs) == 1 else classes


def load_state(model: nn.Module, state: Mapping[str, Tensor], versions: Mapping[str, Any] | None = None) -> None:
    """`model.load_state_dict(state)` for a state whose names and shapes fit.

    `versions` are those of layers that `torch.save` keeps in a state_dict; safetensors does not, and a network such
    as torchvision's MNASNet refuses to load without. Where there are none, they are the network's own.
    """
    versioned = OrderedDict(state)
    versioned._metadata = versions or model.state_dict()._metadata
    model.load_state_dict(versioned)


def count_outputs(model: nn.Module, images: Tensor) -> int:
    """How many the network has for an image.

    Raises:
        BenchmarkError: it fails on one, or gives something else than logits `(N, C)`.
    """
    shape = tuple(images.shape[1:])
    try:
        with torch.no_grad():
            found = model(images[:1])
    except Exception as error:  # a network of the user's raises what it likes
        raise BenchmarkError(f"the model fails on an image {shape}: {type(error).__name__}: {reason(error)}") from error
    if not isinstance(found, Tensor) or found.ndim != 2:
        kind = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise BenchmarkError(f"the model gives {kind} for an image {shape}; expected logits (N, classes)")
    return found.shape[-1]


def check_outputs(model: nn.Module, images: Tensor, classes: tuple[str, ...]) -> None:
    """Raise `BenchmarkError` unless the network has one output a class."""
    outputs = count_outputs(model, images)
    if outputs != len(classes):
        raise BenchmarkError(f"the model has {outputs} outputs, the data {len(classes)} classes")


def _other_shapes(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes in `state`, and those `wanted`, where both have a tensor and the two differ."""
    shapes = {key: (tuple(state[key].shape), tuple(wanted[key].shape)) for key in wanted if key in state}
    return {key: (theirs, ours) for key, (theirs, ours) in shapes.items() if theirs != ours}


def _refuse_misfit(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    wanted = model.state_dict()
    shapes = [f"{key} {theirs} instead of {ours}" for key, (theirs, ours) in _other_shapes(state, wanted).items()]
    problems = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted],
        "wrong shape": shapes,
    }
    found = [f"{problem}: {some(keys, KEYS_SHOWN)}" for problem, keys in problems.items() if keys]
    if found:
        most = 2 * sum(map(len, problems.values())) > len(wanted)
        advice = "; are these weights of another network?" if most else ""
        raise BenchmarkError(f"{path} does not fit the {type(model).__name__}; {'; '.join(found)}{advice}")
