"""Names of all networks, by the data set that they are for."""

from benchmarks.datasets.cifar10 import CIFAR10
from benchmarks.datasets.description import Description
from benchmarks.datasets.digits import DIGITS
from benchmarks.datasets.imagenet import IMAGENET

TORCHVISION = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mnasnet1_0",
    "regnet_x_400mf",
    "regnet_x_3_2gf",
    "vit_b_16",
)
TIMM = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "vit_small_patch16_224",
    "regnetx_006",  # of 600 MF, which torchvision lacks and the papers have
)
PREFIXES = "timm/", "torchvision/"
"""Before names of any other of their networks for classification."""
TIMM_FAMILIES = ("deit_", "deit3_", "vit_tiny_", "vit_small_", "vit_base_", "regnetx_")
"""How names of others of timm's networks begin, which may be given, too."""
NETWORKS: dict[str, tuple[str, ...]] = {
    DIGITS.name: ("resnet8",),
    CIFAR10.name: ("resnet20", "mobilenetv2", "vit"),
    IMAGENET.name: (*TORCHVISION, *TIMM),
}
"""By name of the data set: its networks, the default first."""
ALL_NETWORKS = tuple(name for networks in NETWORKS.values() for name in networks)


def is_timm(name: str) -> bool:
    """Whether a name is one of timm's rather than of torchvision's."""
    return name.startswith((PREFIXES[0], *TIMM_FAMILIES)) and name not in TORCHVISION


def without_library(name: str) -> str:
    """What the library itself calls a network: `timm/resnet18` is its `resnet18`."""
    return name.partition("/")[2] if name.startswith(PREFIXES) else name


def one_name(name: str) -> str:
    """The name without a library's where it is known without: tables of one network have one name for it."""
    bare = without_library(name)
    return bare if bare in (TIMM if is_timm(name) else TORCHVISION) else name


def is_for(name: str, dataset: Description) -> bool:
    """Whether the named network is one for the data set; others of timm's and torchvision's are for that which networks
    are published for."""
    return name in NETWORKS[dataset.name] or (dataset.published and (is_timm(name) or name.startswith(PREFIXES)))
