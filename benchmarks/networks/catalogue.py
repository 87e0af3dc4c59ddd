"""Names of all networks, by the data set that they are for."""

from benchmarks.datasets.cifar10 import CIFAR10
from benchmarks.datasets.description import Description
from benchmarks.datasets.digits import DIGITS
from benchmarks.datasets.imagenet import IMAGENET

TORCHVISION = {
    "resnet18": "layer4",
    "resnet50": "layer4",
    "mobilenet_v2": "features",
    "mnasnet1_0": "layers",
    "regnet_x_400mf": "trunk_output",
    "regnet_x_3_2gf": "trunk_output",
    "vit_b_16": "encoder",
}
TIMM = {
    "deit_tiny_patch16_224": "norm",
    "deit_small_patch16_224": "norm",
    "deit_base_patch16_224": "norm",
    "vit_small_patch16_224": "norm",
    "regnetx_006": "s4",  # of 600 MF, which torchvision lacks and the papers have
}
TIMM_FAMILIES = ("deit_", "deit3_", "vit_tiny_", "vit_small_", "vit_base_", "regnetx_")
"""How names of others of timm's networks begin, which may be given, too."""
NETWORKS: dict[str, dict[str, str]] = {
    DIGITS.name: {"resnet8": "layer3"},
    CIFAR10.name: {"resnet20": "layer3", "mobilenetv2": "features"},
    IMAGENET.name: TORCHVISION | TIMM,
}
"""By name of the data set: its networks, the default first, with the last layer of each that a correction may take
features from."""
ALL_NETWORKS = {name: layer for networks in NETWORKS.values() for name, layer in networks.items()}


def is_timm(name: str) -> bool:
    """Whether a name is one of timm's rather than of torchvision's."""
    return name.startswith(TIMM_FAMILIES) and name not in TORCHVISION


def is_for(name: str, dataset: Description) -> bool:
    """Whether the named network is one for the data set; timm's are for that which networks are published for."""
    return name in NETWORKS[dataset.name] or (dataset.published and is_timm(name))


def features_of(name: str) -> str:
    """The last layer of the named network that a correction may take features from."""
    return ALL_NETWORKS.get(name, "s4" if name.startswith("regnetx_") else "norm")
