"""A data set: labelled images in two parts, for training and for testing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.files import digest_tensors
from benchmarks import BenchmarkError
from benchmarks.datasets.calibration_split import split_calibration
from benchmarks.datasets.images import ImageFiles, Images
from benchmarks.runs.files import digest_text

FOLDS_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images `(N, channels, height, width)` float32, normalised; labels `(N,)` int64, indices into `classes`.

    Training images are for training, calibration and fitting; test images only score. Images that would not fit into
    memory are files, see `benchmarks.datasets.images`. Labels of training images that have none, or other classes, are
    None. Corrections are fitted on `cat_images` where these are not None, or with two `test_folds` on one half of the
    test images and scored on the other, in turn.
    """

    name: str
    train_images: Images
    train_labels: Tensor | None
    test_images: Images
    test_labels: Tensor
    classes: tuple[str, ...]
    cat_images: Images | None = None
    test_folds: int = 1

    def fresh(self, n_calib: int) -> int:
        """How many images are left for corrections where quantization takes `n_calib`."""
        return len(self.train_images) - n_calib if self.cat_images is None else len(self.cat_images)

    def split(self, n_calib: int, n_cat: int, seed: int) -> tuple[Images, Images]:
        """Images for quantization and, with one test fold, others for corrections, drawn at random.

        Raises:
            BenchmarkError: there are too few.
        """
        if self.test_folds > 1:
            fewest = min(len(fit) for fit, _ in self.folds())
            if not 0 < n_cat <= fewest:
                raise BenchmarkError(
                    f"--n-cat {n_cat:,} asks for more than the {fewest:,} images of a fold of "
                    f"{len(self.test_images):,}; lower it, or leave it out for all of them"
                )
            return self.train_images[_drawn(len(self.train_images), n_calib, seed)], self.train_images[:0]
        if self.cat_images is not None:
            cat = self.cat_images[_drawn(len(self.cat_images), n_cat, seed)]
            return self.train_images[_drawn(len(self.train_images), n_calib, seed)], cat
        calib, cat = split_calibration(len(self.train_images), n_calib, n_cat, seed)
        return self.train_images[calib], self.train_images[cat]

    def folds(self) -> list[tuple[Tensor, Tensor]]:
        """Rows of test images to fit on and to score on, of every fold: halves, alike for all seeds."""
        order = torch.randperm(len(self.test_images), generator=torch.Generator().manual_seed(FOLDS_SEED))
        halves = [half.sort().values for half in order.tensor_split(self.test_folds)]
        return [(torch.cat([*halves[:fold], *halves[fold + 1 :]]), half) for fold, half in enumerate(halves)]

    def digest(self) -> str:
        """Changes whenever an image or a label does.

        Training images that are files are told by names and sizes: nobody reads 140 GB for this.
        """
        parts = {part: getattr(self, part) for part in ("train_images", "train_labels", "test_images", "test_labels")}
        tensors = digest_tensors({part: images for part, images in parts.items() if isinstance(images, Tensor)})
        if not isinstance(self.train_images, ImageFiles):
            return tensors
        elsewhere = [self.cat_images.listing()] if isinstance(self.cat_images, ImageFiles) else []
        return digest_text(tensors, self.train_images.listing(), *elsewhere, self.test_digest())

    def test_digest(self) -> str:
        """Changes whenever a test image or its label does."""
        labels = digest_tensors({"test_labels": self.test_labels})
        if isinstance(self.test_images, ImageFiles):
            return digest_text(labels, self.test_images.listing(), *self.test_images.digests())
        return digest_text(labels, digest_tensors({"test_images": self.test_images}))


def _drawn(images: int, number: int, seed: int) -> Tensor:
    """`number` random rows of so many images."""
    if not 0 < number <= images:
        raise BenchmarkError(f"{number:,} images are asked for, there are {images:,}; lower --n-calib or --n-cat")
    return torch.randperm(images, generator=torch.Generator().manual_seed(seed))[:number]
