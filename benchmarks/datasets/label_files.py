"""Files that say which class images are of: `path label` a line, as Caffe has it, or CSV with a header."""

import csv
from collections.abc import Collection
from pathlib import Path, PurePath

from torchvision.datasets.folder import IMG_EXTENSIONS

from benchmarks import BenchmarkError

ENDINGS = ".txt", ".csv", ".tsv"
PATHS = "path", "file", "filename", "file_name", "filepath", "image", "image_path", "image_id", "imageid", "name"
LABELS = "label", "class", "target", "wnid", "synset", "class_id", "label_id", "truelabel"
"""Headers of columns, however they are written."""
EXPECTED = "expected `path label` a line, or a CSV with a header such as path,label"


def is_image(name: str) -> bool:
    """Whether a file is one of an image, by its name."""
    return name.lower().endswith(IMG_EXTENSIONS)


def is_label_file(name: str) -> bool:
    """Whether a file may be one of labels, by its name."""
    return name.lower().endswith(ENDINGS) and not name.startswith(".") and not name.lower().startswith("readme")


def names_one_of(path: Path, images: Collection[str]) -> bool:
    """Whether a line of a file, readable as labels or not, names one of `images`, which are names without folders."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    known = frozenset(images)
    parts = (part for line in lines for part in (line, *line.rsplit(None, 1)[:1], *line.split(","), *line.split("\t")))
    return any(PurePath(part.strip().strip('"')).name in known for part in parts)


def read_labels(path: Path) -> list[tuple[str, str]]:
    """Every image's path, as the file has it, and its label, the name of a class or a number, as text.

    Raises:
        BenchmarkError: the file is not text, has no lines, or one that says no label; or a header of unknown names.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path} cannot be read as a file of labels: {error}; {EXPECTED}") from error
    read = _lines if path.suffix.lower() == ".txt" else _table
    found = read(path, text)
    if not found:
        raise BenchmarkError(f"{path} holds no labels; {EXPECTED}")
    return found


def _lines(path: Path, text: str) -> list[tuple[str, str]]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.rsplit(None, 1)  # of Caffe, where a path may have spaces and a label has none
        if len(parts) == 2:
            found.append((parts[0].strip(), parts[1]))
        elif parts:
            raise BenchmarkError(f"{path}, line {number}: {line.strip()!r} has no label; {EXPECTED}")
    return found


def _table(path: Path, text: str) -> list[tuple[str, str]]:
    try:
        first, *rows = list(
            csv.reader(text.splitlines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        ) or [[]]
    except csv.Error as error:
        raise BenchmarkError(f"{path} cannot be read as a table: {error}; {EXPECTED}") from error
    header = [name.strip().lower() for name in first]
    if any(map(is_image, header)):
        raise BenchmarkError(f"{path} has no header, its first line is an image; {EXPECTED}")
    columns = []
    for kind, names in (("paths", PATHS), ("labels", LABELS)):
        known = [header.index(name) for name in names if name in header]
        if not known:
            raise BenchmarkError(f"{path} has no column of {kind}: its header is {header}, names known {list(names)}")
        columns.append(known[0])
    found = []
    for number, row in enumerate(rows, 2):
        if row and (len(row) <= max(columns) or not all(row[column].strip() for column in columns)):
            raise BenchmarkError(f"{path}, line {number}: {row} lacks a path or a label")
        if row:
            found.append((row[columns[0]].strip(), row[columns[1]].strip()))
    return found
