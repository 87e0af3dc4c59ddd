"""Hugging Face transformers: an image classifier from a config, quantized while it is loaded from a local folder."""

import pytest
import torch


def torchao(bits):
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis
    from transformers import TorchAoConfig

    return TorchAoConfig(IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity=PerAxis(0)))


def quanto(bits):
    from transformers import QuantoConfig

    return QuantoConfig(weights=f"int{bits}")


@pytest.mark.parametrize("backend", [torchao, quanto])
def test_image_classifier(judge, hf_vit, backend, tmp_path):
    hf_vit.save_pretrained(tmp_path)
    quantized = type(hf_vit).from_pretrained(tmp_path, quantization_config=backend(2)).eval()
    name = f"transformers, {backend.__name__}"
    judge(quantized, hf_vit, toolkit=name, distribution="transformers", bits="W2", gains=True)
