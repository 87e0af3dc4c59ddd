"""Images in tar files, of webdataset or plain: unpacked once, through the library that reads them."""

import csv
import itertools
import json
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from benchmarks import BenchmarkError
from benchmarks.datasets.label_files import is_image
from benchmarks.runs.files import digest_text
from benchmarks.wording import reason, some

ENDINGS = ".tar", ".tar.gz", ".tgz"
ENDINGS_SHOWN = 3
IMAGE_KEYS = tuple(ending.removeprefix(".") for ending in IMG_EXTENSIONS)
LABEL_KEYS = "cls", "label", "target", "wnid", "class"
"""Of a sample: files with these endings, or fields of its JSON, hold the label."""
LABELS = "labels.csv"
UNPACKED_AS = "2"
"""Changes with the names that images are unpacked to: what was unpacked to others is not taken."""


def is_shards(place: str) -> bool:
    """Whether a place is a tar file, several as in `val-{000..007}.tar`, or a folder of such files.

    A folder with images or further folders is one of images, whatever archive lies beside them.
    """
    path = Path(place)
    if not path.is_dir():
        return place.lower().endswith(ENDINGS)
    seen = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    unpacked_already = any(entry.is_dir() or is_image(entry.name) for entry in seen)
    return bool(_in_folder(path)) and not unpacked_already


def without_ending(place: str) -> Path:
    """`val` of `val.tar.gz`: what labels beside it are called like."""
    ending = next((each for each in ENDINGS if place.lower().endswith(each)), "")
    return Path(place[: len(place) - len(ending)])


def unpacked(place: str, cache: Path) -> tuple[Path, Path | None]:
    """The folder in `cache` that the images of a place are unpacked to, and a file of labels, where samples have some.

    Images of tar files without such labels keep their names and folders.

    Raises:
        BenchmarkError: a tar file is missing or damaged, or holds no images, or several with one label; or webdataset
            cannot be imported.
    """
    files = _files(place)
    stats = [path.stat() for path in files]
    known = [f"{path.resolve()}:{each.st_size}:{each.st_mtime_ns}" for path, each in zip(files, stats, strict=True)]
    folder = cache / "shards" / digest_text(UNPACKED_AS, *known)
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
    webdataset = _webdataset(place)
    try:
        files = [Path(name) for name in webdataset.shardlists.expand_urls(place)]
    except ValueError as error:  # braceexpand has its own kinds of these
        raise BenchmarkError(f"{place}: {reason(error)}; expected braces as in val-{{000..007}}.tar") from error
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
            name = _free(name, path, labels)
            labels[str(name)] = label
            try:
                str(name).encode()
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(image)
            except (OSError, ValueError) as error:
                raise BenchmarkError(f"{path}: {str(name)!r} in it cannot be unpacked: {reason(error)}") from error
    if not labels:
        raise BenchmarkError(f"{place} holds no images; known are files that end in {', '.join(IMAGE_KEYS)}")
    known = {name: label for name, label in labels.items() if label is not None}
    if known and len(known) < len(labels):
        raise BenchmarkError(f"{place}: {len(labels) - len(known):,} of {len(labels):,} images have no label")
    if known:
        with (folder / LABELS).open("w", encoding="utf-8", newline="") as opened:
            csv.writer(opened, lineterminator="\n").writerows([("path", "label"), *known.items()])


def _free(name: PurePosixPath, path: Path, taken: Container[str]) -> PurePosixPath:
    """`name`, or where that is taken, one with the shard's before it: shards often count their samples anew."""
    stem = path.name.partition(".")[0]
    prefixes = itertools.chain(("", f"{stem}-"), (f"{stem}-{number}-" for number in itertools.count(2)))
    return next(each for each in (name.with_name(prefix + name.name) for prefix in prefixes) if str(each) not in taken)


def _samples(place: str, path: Path) -> Iterator[tuple[str, str, bytes, str | None]]:
    """Key, ending, bytes and label of every image."""
    reader = _webdataset(place).tariterators
    try:
        files = reader.tar_file_expander(reader.url_opener([{"url": str(path)}]))
        for sample in reader.group_by_keys(files, lcase=False):  # names as they are: files of labels have them so
            endings = [ending for ending in sample if ending.lower().rpartition(".")[2] in IMAGE_KEYS]
            label = _label({ending.lower(): value for ending, value in sample.items()})
            if label is not None and len(endings) > 1:
                raise BenchmarkError(
                    f"{path}: one label and {len(endings):,} images are called {sample['__key__']} up to the first "
                    f"dot ({some(endings, ENDINGS_SHOWN)}); expected one image a label"
                )
            for ending in endings:
                yield sample["__key__"], ending, sample[ending], label
    except BenchmarkError:
        raise
    except Exception as error:  # whatever tar files and their compression raise
        raise BenchmarkError(f"{path} cannot be read as a tar file: {reason(error)}") from error


def _label(sample: dict[str, Any]) -> str | None:
    """Of a sample with endings in lower case."""
    fields = json.loads(sample["json"]) if "json" in sample else {}
    found = {**(fields if isinstance(fields, dict) else {}), **sample}
    for key in LABEL_KEYS:
        if key in found:
            value = found[key]
            return (value.decode() if isinstance(value, bytes) else str(value)).strip()
    return None
