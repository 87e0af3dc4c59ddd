from dataclasses import dataclass

import pytest

from benchmarks.reports.tables import csv_table, markdown_table, to_csv, write_texts
from tests.benchmarks.rows import cells

LINES = [("a", "long name", "x"), ("longer", "b", "12.50"), ("c", "d", "-")]


def test_markdown_by_hand():
    assert markdown_table(LINES).splitlines() == [
        "| a      | long name |     x |",
        "| ------ | --------- | ----: |",
        "| longer | b         | 12.50 |",
        "| c      | d         |     - |",
    ]
    assert markdown_table(LINES, text_columns=1).splitlines()[1:3] == [
        "| ------ | --------: | ----: |",
        "| longer |         b | 12.50 |",
    ]
    assert cells(markdown_table(LINES))[2] == ["longer", "b", "12.50"]


def test_lines_of_other_lengths_are_no_table():
    with pytest.raises(ValueError):
        markdown_table([("a", "b"), ("c",)])


@dataclass
class Line:
    name: str
    figure: float | None


def test_csv_by_hand():
    assert csv_table([("a", "b"), (None, 'c,"d"')]) == 'a,b\n,"c,""d"""\n'
    assert to_csv([Line("x", 0.1), Line("y", None)]) == "name,figure\nx,0.1\ny,\n"


def test_files_that_are_there_are_left_alone(tmp_path):
    write_texts(tmp_path, {"a": "one", "b": "two"})
    before = (tmp_path / "a").stat()  # but for the time of the last reading
    assert write_texts(tmp_path, {"a": "one", "b": "three", "c": "new"}) == {"a": True, "b": False, "c": False}
    after = (tmp_path / "a").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (tmp_path / "b").read_text() == "three"
