"""What is known of a data set before it is loaded, and how it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.datasets.dataset import Dataset


@dataclass(frozen=True, kw_only=True)
class Request:
    """How images are to be had; every data set takes of it what concerns it.

    `data` is a folder or an archive, None where the original comes with a library or is downloaded to `cache`, which
    `download` may forbid. Of images in files, `transform` makes an RGB image what the network takes, and `workers`
    processes decode; networks are `accelerated` where they do not run on a CPU. `outputs` says how many the network has
    for an image `(1, C, H, W)`.

    Images in files may also lie elsewhere than in `data`, those for quantization, for corrections and for testing
    (`*_data`), and `classes` is a file that lists the classes. See `Dataset` for `test_folds`; `n_calib` is how many
    images quantization takes.
    """

    data: Path | None
    cache: Path
    calib_data: tuple[str, ...] = ()
    cat_data: tuple[str, ...] = ()
    test_data: tuple[str, ...] = ()
    classes: Path | None = None
    test_folds: int = 1
    n_calib: int | None = None
    download: bool = True
    transform: Callable[[Any], Tensor] | None = None
    outputs: Callable[[Tensor], int] | None = None
    workers: int = 0
    accelerated: bool = False
    progress: bool = False


@dataclass(frozen=True, kw_only=True)
class Description:
    """A data set, called `title` in messages, and what it means for options that are not given.

    `load` gives its images, and `output_count` how many outputs a network for these has: as many as it is known to
    have, which it refuses where labels do not go by so many, or the likeliest number.
    `image_shape` is `(channels, height, width)`; `iters` are iterations a unit of the network.

    Three qualities decide which options it takes: it comes with the library `bundled_with` and has no `--data`; it is
    `in_files`, a folder whose images are decoded when they are needed; there are `published` networks for it whose
    accuracy is known. Where no weights are given and none are published, its `network_is_trained`, as those of
    `RECIPES` are for all, or else it is asked for weights.
    """

    name: str
    title: str
    load: Callable[[Request], Dataset]
    output_count: Callable[[Request, int | None], int]
    image_shape: tuple[int, int, int]
    iters: int
    n_calib: int
    n_cat: int = 1024
    bundled_with: str | None = None
    in_files: bool = False
    published: bool = False
    network_is_trained: bool = False
