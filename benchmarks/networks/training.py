"""Networks without weights of their own: trained once on the training images, then kept as a safetensors file."""

import inspect
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange

from baselines.files import atomic_path, digest_tensors
from benchmarks import BenchmarkError
from benchmarks.datasets.dataset import Dataset
from benchmarks.networks import models
from benchmarks.networks.models import load_weights
from benchmarks.networks.weights_and_transforms import untrained
from benchmarks.runs.files import digest_text
from benchmarks.runs.processes import this_process

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained: a one-cycle learning rate, images shifted at random.

    By Nesterov SGD, or without `momentum` by AdamW. `mirror` turns half of the images around.
    """

    epochs: int = 25
    batch_size: int = 64
    peak_learning_rate: float = 0.2
    momentum: float | None = 0.9
    weight_decay: float = 5e-4
    max_shift: int = 1  # pixels, both ways
    mirror: bool = False
    seed: int = 0


RECIPES = {
    "vit": Training(
        epochs=56,
        batch_size=512,
        peak_learning_rate=2e-3,
        momentum=None,
        weight_decay=0.05,
        max_shift=4,
        mirror=True,
    )
}
"""Of networks that the default does not suit, which are trained here on any data set."""


def trained_model(
    name: str,
    dataset: Dataset,
    cache: Path,
    training: Training | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> nn.Module:
    """The named network trained on `dataset`, on `device`, from `cache` where it is there already.

    A file in the cache that cannot be loaded is trained anew and replaced.

    Raises:
        BenchmarkError: several processes would each train one of `RECIPES`.
    """
    training = training or RECIPES.get(name) or Training()
    path = cache / f"{dataset.name}-{name}-{_cache_key(dataset, training)}.safetensors"
    model = untrained(name, len(dataset.classes), training.seed)
    if path.is_file():
        try:
            load_weights(model, path)
            return model.to(device)
        except BenchmarkError as error:
            logger.warning("training again, the cached network is unusable: %s", error)
    if name in RECIPES and not this_process().alone:
        raise BenchmarkError(f"{name} is trained first, in one process: run the command once without torchrun")
    train(model.to(device), dataset.train_images, dataset.train_labels, training, progress=progress)
    with atomic_path(path) as temporary:
        save_file(model.state_dict(), temporary)
    return model


def train(model: nn.Module, images: Tensor, labels: Tensor, training: Training, *, progress: bool = False) -> None:
    """Train in place, where the model is, on images `(N, channels, height, width)` with labels `(N,)`; ends in eval
    mode."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = _optimizer(model, training)
    steps = -(-len(images) // training.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.peak_learning_rate, epochs=training.epochs, steps_per_epoch=steps
    )
    model.train()
    for _ in trange(training.epochs, desc="training", unit="epoch", leave=False, disable=not progress):
        for batch in torch.randperm(len(images), generator=generator).split(training.batch_size):
            inputs = _shift(images[batch], training.max_shift, generator)
            if training.mirror:
                turned = torch.rand(len(inputs), generator=generator) < 0.5
                inputs[turned] = inputs[turned].flip(-1)
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs.to(device)), labels[batch].to(device)).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    if training.momentum is None:
        return torch.optim.AdamW(model.parameters(), weight_decay=training.weight_decay, lr=1e-3)
    return torch.optim.SGD(
        model.parameters(), momentum=training.momentum, weight_decay=training.weight_decay, nesterov=True, lr=0.01
    )


def _shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Shift the whole batch by up to `most` pixels; the border repeats."""
    down, right = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    padded = functional.pad(images, (most,) * 4, mode="replicate")
    return padded[..., down : down + images.shape[-2], right : right + images.shape[-1]]


def _cache_key(dataset: Dataset, training: Training) -> str:
    """Everything that determines the trained weights, the device aside: recipe, code, libraries and training images."""
    data = digest_tensors({"images": dataset.train_images, "labels": dataset.train_labels})
    code = inspect.getsource(models) + inspect.getsource(sys.modules[__name__])
    return digest_text(repr(asdict(training)), code, torch.__version__, torchvision.__version__, data)
