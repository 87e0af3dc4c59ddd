import shutil
import stat
import tempfile
import zipfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import BenchmarkError
from benchmarks.datasets import cifar10
from benchmarks.datasets.cifar10 import CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD, _extract, load_cifar10


def test_cifar10_folder_is_read_and_normalised(shared_folder, tmp_path):
    dataset = load_cifar10(shared_folder, tmp_path)
    assert dataset.train_images.shape == (60, 3, 32, 32)
    assert dataset.test_labels.tolist() == [label for label in range(10) for _ in range(2)]
    pixels = np.asarray(Image.open(shared_folder / "test" / "bird" / "0001.jpg")) / 255
    expected = (pixels - CIFAR10_MEAN) / CIFAR10_STD
    torch.testing.assert_close(dataset.test_images[5].permute(1, 2, 0), torch.tensor(expected, dtype=torch.float32))


def test_cifar10_zip_equals_the_folder_and_leaves_nothing_behind(shared_folder, cifar_zip, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert load_cifar10(cifar_zip, tmp_path).digest() == load_cifar10(shared_folder, tmp_path).digest()
    assert not list((tmp_path / "temporary").iterdir())


def test_one_folder_around_everything_is_entered(cifar_folder, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    (cifar_folder).rename(outer / "inner")
    assert load_cifar10(outer, tmp_path).train_images.shape == (60, 3, 32, 32)


def remove_part(root):
    shutil.rmtree(root / "test")


def empty_part(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def rename_class(root):
    (root / "test" / "cat").rename(root / "test" / "zebra")


def remove_class(root):
    for part in ("train", "test"):
        shutil.rmtree(root / part / "ship")


def empty_class(root):
    for path in (root / "train" / "dog").iterdir():
        path.unlink()


def break_image(root):
    (root / "train" / "dog" / "0000.jpg").write_bytes(b"no image")


def enlarge_image(root):
    Image.new("RGB", (40, 32)).save(root / "train" / "dog" / "0000.jpg")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_part, r"cifar10: test/ is missing; expected train/<class>/\*\.jpg"),
        (empty_part, r"cifar10: train/ is empty"),
        (
            rename_class,
            r"test/ holds 10 classes that are not the model's 10: missing \['cat'\], unexpected \['zebra'\]",
        ),
        (remove_class, r"train/ holds 9 classes .* missing \['ship'\], unexpected \[\]"),
        (empty_class, r"train/ has a class without images: .*dog"),
        (break_image, r"0000\.jpg cannot be read as an image"),
        (enlarge_image, r"0000\.jpg is 40x32 pixels, expected 32x32"),
    ],
)
def test_damaged_folders_are_refused(cifar_folder, tmp_path, damage, message):
    damage(cifar_folder)
    with pytest.raises(BenchmarkError, match=message):
        load_cifar10(cifar_folder, tmp_path)


def test_missing_source_is_refused(tmp_path):
    with pytest.raises(BenchmarkError, match=r"no such file or folder: .*nowhere"):
        load_cifar10(tmp_path / "nowhere", tmp_path)


class FakeCIFAR10:
    """Torchvision's attributes, without its 170 MB."""

    def __init__(self, root, train, download):
        assert download
        self.data = np.full((3 if train else 2, 32, 32, 3), 255 if train else 0, dtype=np.uint8)
        self.targets = [0] * len(self.data)


def test_download_is_normalised_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "TorchvisionCIFAR10", FakeCIFAR10)
    dataset = load_cifar10(None, tmp_path)
    assert dataset.classes == CIFAR10_CLASSES
    white = (1 - torch.tensor(CIFAR10_MEAN)) / torch.tensor(CIFAR10_STD)
    torch.testing.assert_close(dataset.train_images[0, :, 0, 0], white)
    assert len(dataset.test_images) == 2


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(cifar10, "TorchvisionCIFAR10", fail)
    with pytest.raises(BenchmarkError, match=r"could not be downloaded .*no network.* by --data"):
        load_cifar10(None, tmp_path)


def make_zip(path, *entries):
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("train/first.txt", "first")
        for entry in entries:
            opened.writestr(entry, "content")
    return path


def test_zip_is_extracted(tmp_path):
    _extract(make_zip(tmp_path / "good.zip", "test/second.txt", "test/a..b.txt"), tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.txt")}
    assert found == {"train/first.txt", "test/second.txt", "test/a..b.txt"}


@pytest.mark.parametrize(
    "name", ["../out.txt", "train/../../out.txt", "ROOT/out.txt", "..\\out.txt", "C:\\out.txt", "C:out.txt"]
)
def test_zip_entry_that_points_outside_lands_inside(tmp_path, name):
    archive = make_zip(tmp_path / "bad.zip", name.replace("ROOT", str(tmp_path)))
    _extract(archive, tmp_path / "inner" / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bad.zip", "inner"}
    assert [path.name for path in (tmp_path / "inner").iterdir()] == ["out"]
    files = [path for path in (tmp_path / "inner" / "out").rglob("*") if path.is_file()]
    assert len(files) == 2 and any(path.name.endswith("out.txt") for path in files)


def test_symbolic_link_in_a_zip_is_a_plain_file(tmp_path):
    link = zipfile.ZipInfo("train/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    _extract(make_zip(tmp_path / "bad.zip", link), tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_what_is_no_zip_is_refused(tmp_path):
    (tmp_path / "no.zip").write_bytes(b"no archive")
    with pytest.raises(BenchmarkError, match=r"no\.zip cannot be read as a zip archive"):
        _extract(tmp_path / "no.zip", tmp_path / "out")


def damage_stream(path):
    """The entry keeps its place and length, but cannot be inflated."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("first.txt", b"first" * 1000)
        (entry,) = opened.infolist()
    content = bytearray(path.read_bytes())
    start = entry.header_offset + 30 + len(entry.filename)
    content[start : start + entry.compress_size] = b"\xff" * entry.compress_size
    path.write_bytes(content)


def cut_off_data(path):
    """The directory at the end promises more than there is."""
    content = make_zip(path).read_bytes()
    sizes = content.index(b"PK\x01\x02") + 20
    path.write_bytes(content[:sizes] + (10**6).to_bytes(4, "little") * 2 + content[sizes + 8 :])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_stream, "Error -3 while decompressing"),
        (cut_off_data, "it is cut off"),
        (lambda path: make_zip(path, "train/first.txt/second.txt"), "Not a directory"),
        (lambda path: make_zip(path, "test/second.txt", "test"), "Is a directory"),
    ],
    ids=["stream", "cut off", "file, then folder", "folder, then file"],
)
def test_damaged_zip_is_refused(tmp_path, damage, reason):
    damage(tmp_path / "bad.zip")
    with pytest.raises(BenchmarkError, match=rf"bad\.zip cannot be read as a zip archive: .*{reason}"):
        _extract(tmp_path / "bad.zip", tmp_path / "out")
