"""Full-precision networks that know the digits, trained within seconds; logits of whatever a toolkit makes of them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.datasets.dataset import Dataset
from benchmarks.networks.training import Training, train
from benchmarks.networks.weights_and_transforms import untrained

EPOCHS, BATCH_SIZE, PEAK_LEARNING_RATE, LABEL_SMOOTHING = 25, 64, 3e-3, 0.1


def convolutional(digits: Dataset) -> nn.Module:
    """ResNet-8 of torchvision's blocks, as the benchmarks train it."""
    model = untrained("resnet8", len(digits.classes))
    train(model, digits.train_images, digits.train_labels, Training())
    return model


def transformer(digits: Dataset) -> nn.Module:
    """A ViT of timm's blocks, with patches of 2x2 pixels."""
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 2, "num_heads": 4}
        model = VisionTransformer(**shape, mlp_ratio=2, num_classes=len(digits.classes))
    return train_transformer(model, digits)


def hugging_face(digits: Dataset) -> nn.Module:
    """A smaller one of Hugging Face `transformers`, which returns a `ModelOutput`."""
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 32, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(**shape, num_hidden_layers=2, num_attention_heads=4, num_labels=len(digits.classes))
        model = ViTForImageClassification(config)
    return train_transformer(model, digits)


def train_transformer(model: nn.Module, digits: Dataset) -> nn.Module:
    """AdamW under a one-cycle learning rate; ends in eval mode."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = -(-len(digits.train_images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, epochs=EPOCHS, steps_per_epoch=steps)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(digits.train_images), generator=generator).split(BATCH_SIZE):
            optimizer.zero_grad()
            logits = plain(model(digits.train_images[batch]))
            functional.cross_entropy(logits, digits.train_labels[batch], label_smoothing=LABEL_SMOOTHING).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def plain(output: Any) -> Tensor:
    """The logits in an output, as an ordinary tensor: of a tensor subclass, a Brevitas or a Hugging Face output."""
    for field in ("logits", "value"):
        output = getattr(output, field, output)
    return output.as_subclass(Tensor)
