"""CAT as a plug-in for post-training quantization: corrects a quantized model's logits towards full precision."""

from cat_plugin.api import apply_cat
from cat_plugin.config import CATConfig
from cat_plugin.correction.channel_affine import ChannelAffine
from cat_plugin.correction.module import ClusterAffine
from cat_plugin.errors import CATError
from cat_plugin.evaluation import compare_accuracy
from cat_plugin.fitting.fit import fit_cluster_affine
from cat_plugin.wrapper import CATWrapper

__all__ = [
    "CATConfig",
    "CATError",
    "CATWrapper",
    "ChannelAffine",
    "ClusterAffine",
    "apply_cat",
    "compare_accuracy",
    "fit_cluster_affine",
]
__version__ = "0.1.0"
