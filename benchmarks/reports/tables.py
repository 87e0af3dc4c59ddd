"""Tables as Markdown and as CSV, and the files that they are written to."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.runs.files import write_text


def markdown_table(lines: Sequence[Sequence[str]], text_columns: int = 2) -> str:
    """A Markdown table that also reads well on a console; the first line is the header.

    The first `text_columns` columns are padded to the left, then come figures, to the right.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if index < text_columns else "-" * (width - 1) + ":" for index, width in enumerate(widths)]

    def joined(cells: Sequence[str]) -> str:
        sides = "<" * text_columns + ">" * (len(cells) - text_columns)
        padded = [f"{text:{side}{width}}" for text, side, width in zip(cells, sides, widths, strict=True)]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(joined, [lines[0], rule, *lines[1:]]))


def csv_table(lines: Iterable[Sequence[Any]]) -> str:
    """The lines as CSV, the first is the header; empty where a value is None."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def to_csv(rows: Sequence[Any]) -> str:
    """One line for each of the dataclass instances, all of one type."""
    return csv_table([[field.name for field in fields(rows[0])], *(asdict(row).values() for row in rows)])


def write_texts(folder: Path, texts: dict[str, str]) -> dict[str, bool]:
    """Write files by name; which there are, and whether each was there just the same, and so was not touched."""
    same = {}
    for name, text in texts.items():
        path = folder / name
        same[name] = path.is_file() and path.read_bytes() == text.encode()
        if not same[name]:
            write_text(path, text)
    return same
