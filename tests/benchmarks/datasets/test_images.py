"""Files decoded when they are needed, against PIL and hashlib."""

import hashlib
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms._presets import ImageClassification

from benchmarks import BenchmarkError
from benchmarks.datasets.images import FILES_BATCH, ImageFiles, batches, digests, stacked

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture
def files(imagenet_folder):
    names = sorted(path.relative_to(imagenet_folder).as_posix() for path in imagenet_folder.rglob("*.JPEG"))
    return ImageFiles(root=imagenet_folder, names=tuple(names), transform=ImageClassification(crop_size=32))


def by_pil(path, crop=32, resize=256):
    """Resize the short side, cut out the middle, normalise; `(3, crop, crop)`."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    # torchvision cuts the long side down to whole pixels.
    size = (resize, int(resize * height / width)) if width <= height else (int(resize * width / height), resize)
    pixels = np.asarray(image.resize(size, Image.BILINEAR)) / 255
    top, left = (round((pixels.shape[axis] - crop) / 2) for axis in (0, 1))
    cut = pixels[top : top + crop, left : left + crop]
    return torch.tensor((cut - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)


def test_files_are_decoded_and_normalised_in_order(files):
    found = stacked(files)
    assert found.shape == (len(files), 3, 32, 32)
    for row in (0, 1, 20, len(files) - 1):
        torch.testing.assert_close(found[row], by_pil(files.root / files.names[row]), atol=0.02, rtol=0)


def test_rows_are_those_asked_for(files):
    whole, rows = stacked(files), torch.tensor([7, 2, 7, 40])
    assert torch.equal(stacked(files[rows]), whole[rows])
    assert torch.equal(stacked(files[3:9]), whole[3:9])
    assert len(files[rows]) == 4 and len(files[:0]) == 0


def test_workers_give_the_same_and_draw_nothing_from_the_global_generator(files):
    many = replace(files, names=files.names * 2)
    assert len(many) > FILES_BATCH
    before = torch.get_rng_state()
    alone, shared = stacked(many), stacked(replace(many, workers=2))
    assert torch.equal(alone, shared)
    assert [len(batch) for batch in batches(many)] == [FILES_BATCH, len(many) - FILES_BATCH]
    assert [len(batch) for batch in batches(replace(files[:40], at_once=16))] == [16, 16, 8]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"no image", "cut"], ids=["empty", "text", "cut off"])
def test_damaged_file_is_an_error_of_one_line_that_names_it(files, content, workers):
    path = files.root / files.names[5]
    path.write_bytes(path.read_bytes()[:300] if content == "cut" else content)
    with pytest.raises(BenchmarkError) as error:
        stacked(replace(files, workers=workers))
    assert str(error.value).startswith(f"{path} cannot be read as an image: ")
    assert "\n" not in str(error.value)


def test_digests_are_those_of_the_bytes(files):
    assert digests(files) == [
        hashlib.sha256((files.root / name).read_bytes()).hexdigest()[: len(digests(files)[0])] for name in files.names
    ]
    assert len(set(digests(files))) == len(files)


def test_digest_follows_a_file_that_changes(files):
    path = files.root / files.names[4]
    first, before = digests(files), path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    assert [one != two for one, two in zip(first, digests(files), strict=True)].index(True) == 4


def test_file_that_is_gone_is_an_error_of_the_user(files):
    (files.root / files.names[0]).unlink()
    with pytest.raises(BenchmarkError, match=r"train_0\.JPEG cannot be read"):
        digests(files)


def test_link_to_nothing_is_an_error_of_the_user(files):
    path = files.root / files.names[3]
    path.unlink()
    path.symlink_to(files.root / "nowhere")
    with pytest.raises(BenchmarkError, match=f"{path.name} cannot be read"):
        files.listing()


def die(image):
    """As a worker that gets no shared memory, or too much of it."""
    os.kill(os.getpid(), signal.SIGKILL)


def mistake(image):
    raise RuntimeError("a mistake")


def test_dead_worker_is_an_error_that_says_what_to_do(files):
    with pytest.raises(BenchmarkError, match=r"1 processes .* failed \(.*\); decode .* --workers 0, .* --shm-size 8g"):
        stacked(replace(files[:2], transform=die, workers=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_mistake_in_the_code_is_not_taken_for_one(files, workers):
    with pytest.raises(RuntimeError, match="a mistake"):
        stacked(replace(files[:2], transform=mistake, workers=workers))


def test_listing_changes_with_names_sizes_and_transform(files):
    seen = {files.listing(), files[1:].listing(), replace(files, transform=ImageClassification(crop_size=31)).listing()}
    (files.root / files.names[0]).open("ab").write(b"\0")
    seen.add(files.listing())
    assert len(seen) == 4
    assert files.listing() in seen


def test_tensors_pass_through():
    images = torch.randn(3, 1, 8, 8)
    assert stacked(images) is images and batches(images) is images
