"""One small network of each architecture family of timm and torchvision."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import timm
import torchvision
from torch import nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A network of a family: its name in timm or torchvision, the size of its images, and what else builds it."""

    name: str
    size: int = 64
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    of_torchvision: bool = False

    def build(self) -> nn.Module:
        """With ten classes and random weights."""
        if self.of_torchvision:
            return getattr(torchvision.models, self.name)(num_classes=10, **self.options)
        return timm.create_model(self.name, num_classes=10, **self.options)


def _timm(name: str, size: int = 64, **options: object) -> Family:
    return Family(name=name, size=size, options=options)


def _torchvision(name: str, size: int = 64, **options: object) -> Family:
    return Family(name=name, size=size, options=options, of_torchvision=True)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "beit": _timm("beit_base_patch16_224", img_size=64, depth=2),
        "byobnet": _timm("test_byobnet"),
        "repvgg": _timm("repvgg_a0"),
        "cait": _timm("cait_xxs24_224", img_size=64, depth=4),
        "convit": _timm("convit_tiny", img_size=64),
        "convmixer": _timm("convmixer_768_32"),
        "convnext": _timm("test_convnext"),
        "cpubone": _timm("cpubone_nano"),
        "crossvit": _timm("crossvit_tiny_240", 120, img_size=120),
        "csatv2": _timm("csatv2"),
        "cspnet": _timm("cs3darknet_focus_s"),
        "cspnext": _timm("cspnext_tiny"),
        "davit": _timm("davit_tiny", depths=(1, 1, 1, 1)),
        "deit": _timm("deit_tiny_distilled_patch16_224", img_size=64, depth=4),
        "dla": _timm("dla46x_c"),
        "edgenext": _timm("edgenext_xx_small"),
        "efficientformer_v2": _timm("efficientformerv2_s0", img_size=64),
        "efficientnet": _timm("mnasnet_small"),
        "tf_efficientnet": _timm("tf_efficientnet_lite0"),
        "efficientvit_mit": _timm("efficientvit_b0"),
        "efficientvit_msra": _timm("efficientvit_m0", img_size=64),
        "eva": _timm("eva02_tiny_patch14_224", 56, img_size=56, depth=4),
        "fasternet": _timm("fasternet_t0"),
        "fastvit": _timm("fastvit_t8"),
        "gcvit": _timm("gcvit_xxtiny", img_size=64),
        "ghostnet": _timm("ghostnet_050"),
        "hardcorenas": _timm("hardcorenas_b"),
        "hgnet": _timm("hgnetv2_b0"),
        "hiera": _timm("hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1)),
        "iformer": _timm("iformer_t"),
        "inception_next": _timm("inception_next_atto"),
        "lcnetv2": _timm("lcnetv2_small"),
        "lowformer": _timm("lowformer_b0"),
        "mambaout": _timm("test_mambaout"),
        "maxxvit": _timm("test_maxvit", img_size=64),
        "metaformer": _timm("poolformerv2_s12"),
        "mlp_mixer": _timm("gmlp_ti16_224", img_size=64),
        "mobilenetv3": _timm("mobilenetv3_small_050"),
        "mobilevit": _timm("mobilevit_xxs"),
        "mvitv2": _timm("mvitv2_tiny", img_size=64),
        "naflexvit": _timm("naflexvit_base_patch16_gap", depth=2),
        "nest": _timm("nest_tiny", img_size=64),
        "nfnet": _timm("test_nfnet"),
        "pit": _timm("pit_ti_distilled_224", img_size=64),
        "pvt_v2": _timm("pvt_v2_b0"),
        "qwen3_vit": _timm("qwen3_vit_88m", 96, depth=2),
        "regnet": _timm("regnety_002"),
        "repghost": _timm("repghostnet_050"),
        "repvit": _timm("repvit_m1"),
        "res2net": _timm("res2net50_14w_8s"),
        "resnest": _timm("resnest14d"),
        "resnet": _timm("resnet10t"),
        "resnetv2": _timm("resnetv2_18"),
        "resnetv2_bit": _timm("resnetv2_50x1_bit"),
        "rexnet": _timm("rexnet_100"),
        "senet": _timm("legacy_seresnet18"),
        "shvit": _timm("shvit_s1"),
        "sknet": _timm("skresnet18"),
        "starnet": _timm("starnet_s050"),
        "swiftformer": _timm("swiftformer_xs"),
        "swin_transformer": _timm("swin_tiny_patch4_window7_224", 56, img_size=56, depths=(2, 2)),
        "swin_transformer_v2_cr": _timm("swinv2_cr_tiny_224", img_size=64, depths=(1, 1, 1, 1)),
        "tiny_vit": _timm("tiny_vit_5m_224"),
        "tnt": _timm("tnt_s_patch16_224", img_size=64, depth=4),
        "twins": _timm("twins_svt_small", img_size=64),
        "visformer": _timm("visformer_tiny", img_size=64),
        "vision_transformer": _timm("test_vit", img_size=64),
        "vision_transformer_hybrid": _timm("vit_tiny_r_s16_p8_224", img_size=64, depth=4),
        "vision_transformer_relpos": _timm("vit_relpos_small_patch16_224", img_size=64, depth=4),
        "vision_transformer_sam": _timm("samvit_base_patch16_224", img_size=64, depth=2),
        "vitamin": _timm("vitamin_small_224", img_size=64),
        "vovnet": _timm("ese_vovnet19b_slim_dw"),
        "xcit": _timm("xcit_nano_12_p8_224", img_size=64),
        "tv_maxvit": _torchvision(
            "MaxVit",
            input_size=(64, 64),
            stem_channels=16,
            partition_size=2,
            block_channels=[16, 32],
            block_layers=[1, 1],
            head_dim=8,
            stochastic_depth_prob=0.0,
        ),
        "tv_mnasnet": _torchvision("mnasnet0_5"),
        "tv_mobilenet_v2": _torchvision("mobilenet_v2", width_mult=0.35),
        "tv_mobilenet_v3": _torchvision("mobilenet_v3_small"),
        "tv_shufflenet_v2": _torchvision("shufflenet_v2_x0_5"),
        "tv_squeezenet": _torchvision("squeezenet1_1"),
        "tv_vit": _torchvision(
            "VisionTransformer",
            image_size=64,
            patch_size=16,
            num_layers=2,
            num_heads=4,
            hidden_dim=64,
            mlp_dim=128,
        ),
        # These take longest.
        "nasnet": _timm("nasnetalarge", 96),
        "pnasnet": _timm("pnasnet5large", 96),
        "mobilenetv5": _timm("mobilenetv5_base"),
        "inception_resnet_v2": _timm("inception_resnet_v2", 96),
        "inception_v4": _timm("inception_v4", 96),
        "inception_v3": _timm("inception_v3", 96),
        "vgg": _timm("vgg11"),
        "tv_alexnet": _torchvision("alexnet", 96),
        "tresnet": _timm("tresnet_m"),
        "selecsls": _timm("selecsls42"),
        "nextvit": _timm("nextvit_small"),
        "hrnet": _timm("hrnet_w18_small"),
        "hieradet_sam2": _timm("sam2_hiera_tiny"),
        "efficientformer": _timm("efficientformer_l1", 224),
        "levit": _timm("levit_128s", 224),
        "tv_swin": _torchvision("swin_v2_t"),
        "tv_inception_v3": _torchvision("inception_v3", 128, init_weights=False, aux_logits=False),
        "tv_googlenet": _torchvision("googlenet", 96, init_weights=False, aux_logits=False),
        "deepseek_vit": _timm("deepseek_vit_412m", 224, depth=2),
        "gemma4_vit": _timm("gemma4_vit_167m", 96, depth=2),
        "byoanet": _timm("lambda_resnet26t"),
        "coat": _timm("coat_tiny", img_size=64),
        "densenet": _timm("densenet121"),
        "xception_aligned": _timm("xception41", 96),
        "xception": _timm("legacy_xception", 96),
        "dpn": _timm("dpn48b"),
        "rdnet": _timm("rdnet_tiny"),
        "efficientvim": _timm("efficientvim_m1"),
        "focalnet": _timm("focalnet_tiny_srf"),
        "volo": _timm("volo_d1_224", img_size=64),
        "sequencer": _timm("sequencer2d_s", img_size=64, layers=(1, 1, 1, 1)),
        "swin_transformer_v2": _timm("swinv2_tiny_window8_256", img_size=64, depths=(2, 2)),
    }
)

LEFT: Mapping[str, str] = MappingProxyType(
    {
        "lowformer": "transposed convolutions",
        "sequencer": "recurrent layers",
    }
)
"""What stays in floating point although one would expect it to be quantized, by family."""

ORDINARY = (
    *("byobnet", "convnext", "deit", "maxxvit", "mobilenetv3"),
    *("nfnet", "resnet", "starnet", "tv_shufflenet_v2", "tv_vit"),
)
"""Those that are quantized in the ordinary suite, since they are small and of all kinds."""
