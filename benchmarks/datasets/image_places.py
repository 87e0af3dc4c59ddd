"""Images where people have them: in class folders, flat with a file of labels, in tar files, or without labels."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torchvision.datasets import ImageFolder

from benchmarks import BenchmarkError
from benchmarks.datasets.label_files import ENDINGS, EXPECTED, is_image, is_label_file, names_one_of, read_labels
from benchmarks.datasets.shards import is_shards, unpacked, without_ending
from benchmarks.wording import counted

LAYOUT = "expected train/<class>/*.JPEG and val/<class>/*.JPEG"
OTHERWISE = "a flat folder with a file of labels, or tar files"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder of images: with its class folders `classes`, else with a file `labels`, else they have no labels.

    `shown` is what messages call it.
    """

    folder: Path
    shown: str
    classes: tuple[str, ...] = ()
    labels: Path | None = None

    @property
    def is_labelled(self) -> bool:
        return bool(self.classes) or self.labels is not None

    @cached_property
    def listed(self) -> list[tuple[str, str]]:
        """What the file of labels lists, see `read_labels`."""
        return read_labels(self.labels)

    @cached_property
    def class_names(self) -> frozenset[str]:
        """Labels that occur, numbers as text where the file of labels has numbers."""
        return frozenset(label for _, label in self.listed) if self.labels else frozenset(self.classes)

    def files(self) -> "Files":
        """All images.

        Raises:
            BenchmarkError: a class folder has no image, or an image that the file of labels names is not there.
        """
        if self.labels is not None:
            return self._from_labels(self.labels)
        if self.classes:
            try:
                found = _ClassFolders(str(self.folder), self.classes)
            except FileNotFoundError as error:
                raise BenchmarkError(f"{self.shown}/ has classes without images: {error}") from error
            root = Path(os.path.abspath(self.folder)).parent
            paths = [Path(os.path.relpath(path, root)).as_posix() for path, _ in found.samples]
            return Files(root, tuple(paths), tuple(found.classes[index] for index in found.targets))
        return Files(self.folder, tuple(sorted(_loose(list(os.scandir(self.folder))))), None)

    def _from_labels(self, path: Path) -> "Files":
        listed = self.listed
        folders = [folder for folder in dict.fromkeys((self.folder, path.parent / path.stem)) if folder.is_dir()]
        # The first image says which of the folders paths start from.
        root = next((folder for folder in folders if os.path.isfile(folder / listed[0][0])), folders[0])
        missing = [name for name, _ in listed if not os.path.isfile(root / name)]
        if missing:
            raise BenchmarkError(
                f"{path} names {counted(len(missing), 'image')} of {len(listed):,} not there, such as {missing[0]}; "
                f"looked in {' and '.join(map(str, folders if len(missing) == len(listed) else [root]))}"
            )
        names, labels = zip(*listed, strict=True)
        return Files(root, tuple(os.path.normpath(name) for name in names), labels)


class _ClassFolders(ImageFolder):
    """Images in the folders of `names` alone; none that are hidden or in hidden folders, copies of a system's own."""

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self._names = names
        super().__init__(folder, is_valid_file=lambda path: is_image(path) and f"{os.sep}." not in path[len(folder) :])

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """In the order of `names`."""
        return list(self._names), {name: index for index, name in enumerate(self._names)}


@dataclass(frozen=True)
class Files:
    """Images under `root` by name, with the labels of all of them, as text, or None."""

    root: Path
    names: tuple[str, ...]
    labels: tuple[str, ...] | None


def place_of(text: str, cache: Path, labels_needed: bool = True) -> Place:
    """The place that an option names: a folder, a file of labels, or tar files, which are unpacked to `cache`.

    Unless `labels_needed`, files with images that name none of these, such as a licence, are no files of labels.

    Raises:
        BenchmarkError: there is no such place, it holds no images, or several files of labels.
    """
    path = Path(text)
    if is_shards(text):
        folder, labels = unpacked(text, cache)
        if labels is None:
            labels = _beside(without_ending(text))
            folder = _inner(folder, flat=labels is not None)
        return Place(folder=folder, shown=text, labels=labels) if labels else _folder(folder, text, labels_needed)
    if path.is_file():
        if not is_label_file(path.name):
            raise BenchmarkError(
                f"{path} is a file, and none of labels ({', '.join(ENDINGS)}) nor a tar file; {LAYOUT}"
            )
        return Place(folder=path.parent, shown=text, labels=path)
    if not path.is_dir():
        raise BenchmarkError(f"{path} does not exist; {LAYOUT}, {OTHERWISE}")
    return _folder(path, text, labels_needed)


def joined(all_files: Sequence[Files]) -> Files:
    """Of several places, those that have labels with these."""
    if len(all_files) == 1:
        return all_files[0]
    root = Path(os.path.commonpath([each.root.resolve() for each in all_files]))
    names = [
        Path(os.path.relpath(each.root.resolve() / name, root)).as_posix() for each in all_files for name in each.names
    ]
    labels = [label for each in all_files for label in each.labels or ()]
    return Files(root, tuple(names), tuple(labels) if len(labels) == len(names) else None)


def _folder(folder: Path, shown: str, labels_needed: bool) -> Place:
    entries = list(os.scandir(folder))
    loose = _loose(entries)
    if loose:
        inside = [folder / entry.name for entry in entries if entry.is_file() and is_label_file(entry.name)]
        beside = [path for path in [_beside(folder)] if path]
        if not labels_needed:
            inside, beside = ([path for path in each if names_one_of(path, loose)] for each in (inside, beside))
        found = inside or beside
        if len(found) > 1:
            names = ", ".join(sorted(path.name for path in found))
            raise BenchmarkError(
                f"{shown}/ holds several files that may be of labels ({names}); give one of them itself"
            )
        return Place(folder=folder, shown=shown, labels=found[0] if found else None)
    classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise BenchmarkError(f"{shown}/ is empty; {LAYOUT}")
    return Place(folder=folder, shown=shown, classes=tuple(classes))


def _inner(folder: Path, flat: bool) -> Path:
    """The folder below those that hold one folder and nothing else; one of images is a class unless they are `flat`."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if len(entries) == 1 and entries[0].is_dir() and (flat or any(each.is_dir() for each in entries[0].iterdir())):
        return _inner(entries[0], flat)
    return folder


def _beside(path: Path) -> Path | None:
    """`val.txt` of the folder `val`."""
    path = path if path.name else path.absolute()  # the current directory
    found = [path.parent / f"{path.name}{ending}" for ending in ENDINGS]
    return next((each for each in found if each.is_file()), None)


def _loose(entries: Sequence[os.DirEntry]) -> list[str]:
    """Names of images that lie in no further folder; of hidden files there are copies of a system's own."""
    return [
        entry.name for entry in entries if is_image(entry.name) and not entry.name.startswith(".") and entry.is_file()
    ]


def unlabelled(place: Place) -> BenchmarkError:
    """That images to test on need labels."""
    loose = len(_loose(list(os.scandir(place.folder))))
    return BenchmarkError(
        f"{place.shown}/ holds {loose:,} images that are not sorted into class folders and have no file of labels; "
        f"for test images, {LAYOUT}, or in a file beside them: {EXPECTED}"
    )
