"""A data set: labelled images in two parts, for training and for testing."""

from dataclasses import dataclass

from torch import Tensor

from baselines.files import digest_tensors
from benchmarks.datasets.images import ImageFiles, Images
from benchmarks.runs.files import digest_text


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images `(N, channels, height, width)` float32, normalised; labels `(N,)` int64, indices into `classes`.

    Training images are for training, calibration and fitting; test images only score. Images that would not fit into
    memory are files, see `benchmarks.datasets.images`.
    """

    name: str
    train_images: Images
    train_labels: Tensor
    test_images: Images
    test_labels: Tensor
    classes: tuple[str, ...]

    def digest(self) -> str:
        """Changes whenever an image or a label does.

        Training images that are files are told by names and sizes: nobody reads 140 GB for this.
        """
        parts = {part: getattr(self, part) for part in ("train_images", "train_labels", "test_images", "test_labels")}
        tensors = digest_tensors({part: images for part, images in parts.items() if isinstance(images, Tensor)})
        if not isinstance(self.train_images, ImageFiles):
            return tensors
        return digest_text(tensors, self.train_images.listing(), self.test_digest())

    def test_digest(self) -> str:
        """Changes whenever a test image or its label does."""
        labels = digest_tensors({"test_labels": self.test_labels})
        if isinstance(self.test_images, ImageFiles):
            return digest_text(labels, self.test_images.listing(), *self.test_images.digests())
        return digest_text(labels, digest_tensors({"test_images": self.test_images}))
