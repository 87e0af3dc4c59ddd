"""Images in tar files, of webdataset or plain: unpacked once, through the library that reads them."""

import csv
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from benchmarks import BenchmarkError
from benchmarks.runs.files import digest_text
from benchmarks.wording import reason

ENDINGS = ".tar", ".tar.gz", ".tgz"
IMAGE_KEYS = tuple(ending.removeprefix(".") for ending in IMG_EXTENSIONS)
LABEL_KEYS = "cls", "label", "target", "wnid", "class"
"""Of a sample: files with these endings, or fields of its JSON, hold the label."""
LABELS = "labels.csv"


def is_shards(place: str) -> bool:
    """Whether a place is a tar file, several as in `val-{000..007}.tar`, or a folder of such files.

    A folder with images or further folders is one of images, whatever archive lies beside them.
    """
    path = Path(place)
    if not path.is_dir():
        return place.lower().endswith(ENDINGS)
    seen = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    unpacked_already = any(entry.is_dir() or entry.name.lower().endswith(IMG_EXTENSIONS) for entry in seen)
    return bool(_in_folder(path)) and not unpacked_already


def unpacked(place: str, cache: Path) -> tuple[Path, Path | None]:
    """The folder in `cache` that the images of a place are unpacked to, and a file of labels, where samples have some.

    Images of tar files without such labels keep their names and folders.

    Raises:
        BenchmarkError: a tar file is missing or damaged, or holds no images; or webdataset cannot be imported.
    """
    files = _files(place)
    stats = [path.stat() for path in files]
    known = [f"{path.resolve()}:{each.st_size}:{each.st_mtime_ns}" for path, each in zip(files, stats, strict=True)]
    folder = cache / "shards" / digest_text(*known)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as temporary:
            unfinished = Path(temporary) / "images"
            _unpack(place, files, unfinished)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process has been faster
                    raise
    labels = folder / LABELS
    return folder, labels if labels.is_file() else None


def _in_folder(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.name.lower().endswith(ENDINGS) and path.is_file()]
    return sorted(path for path in found if not path.name.startswith("."))


def _files(place: str) -> list[Path]:
    if Path(place).is_dir():
        return _in_folder(Path(place))
    files = [Path(name) for name in _webdataset(place).shardlists.expand_urls(place)]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise BenchmarkError(f"no such file: {missing[0]}, one of {len(files):,} tar files of {place}")
    return files


def _webdataset(place: str) -> Any:
    try:
        import webdataset
        import webdataset.tariterators
    except ImportError as error:
        raise BenchmarkError(
            f"{place}: webdataset, which reads tar files, cannot be imported ({error}); pip install webdataset"
        ) from error
    return webdataset


def _unpack(place: str, files: list[Path], folder: Path) -> None:
    labels: dict[str, str | None] = {}
    for path in files:
        for key, ending, image, label in _samples(place, path):
            name = PurePosixPath(f"{key}.{ending}")
            if name.is_absolute() or ".." in name.parts:
                raise BenchmarkError(f"{path} holds {key}, which is outside of the folder that it is unpacked to")
            if str(name) in labels:  # shards often count their samples anew
                name = path.name.partition(".")[0] / name
            labels[str(name)] = label
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(image)
    if not labels:
        raise BenchmarkError(f"{place} holds no images; known are files that end in {', '.join(IMAGE_KEYS)}")
    known = {name: label for name, label in labels.items() if label is not None}
    if known and len(known) < len(labels):
        raise BenchmarkError(f"{place}: {len(labels) - len(known):,} of {len(labels):,} images have no label")
    if known:
        with (folder / LABELS).open("w", encoding="utf-8", newline="") as opened:
            csv.writer(opened, lineterminator="\n").writerows([("path", "label"), *known.items()])


def _samples(place: str, path: Path) -> Iterator[tuple[str, str, bytes, str | None]]:
    """Key, ending, bytes and label of every image."""
    try:
        for sample in _webdataset(place).tariterators.tarfile_samples([{"url": str(path)}]):
            endings = [ending for ending in sample if ending.rpartition(".")[2] in IMAGE_KEYS]
            if endings:
                yield sample["__key__"], endings[0], sample[endings[0]], _label(sample)
    except BenchmarkError:
        raise
    except Exception as error:  # whatever tar files and their compression raise
        raise BenchmarkError(f"{path} cannot be read as a tar file: {reason(error)}") from error


def _label(sample: dict[str, Any]) -> str | None:
    fields = json.loads(sample["json"]) if "json" in sample else {}
    found = {**(fields if isinstance(fields, dict) else {}), **sample}
    for key in LABEL_KEYS:
        if key in found:
            value = found[key]
            return (value.decode() if isinstance(value, bytes) else str(value)).strip()
    return None
