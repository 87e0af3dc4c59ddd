import stat
import zipfile

import pytest

from benchmarks import BenchmarkError
from benchmarks.runs.files import digest_text, extract_zip, write_text


def make_zip(path, *entries):
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("train/first.txt", "first")
        for entry in entries:
            opened.writestr(entry, "content")
    return path


def test_zip_is_extracted(tmp_path):
    extract_zip(make_zip(tmp_path / "good.zip", "test/second.txt", "test/a..b.txt"), tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.txt")}
    assert found == {"train/first.txt", "test/second.txt", "test/a..b.txt"}


@pytest.mark.parametrize(
    "name", ["../out.txt", "train/../../out.txt", "/tmp/out.txt", "..\\out.txt", "C:\\out.txt", "C:out.txt"]
)
def test_zip_entry_outside_is_refused_before_anything_is_extracted(tmp_path, name):
    archive = make_zip(tmp_path / "bad.zip", name)
    with pytest.raises(BenchmarkError, match=r"bad\.zip: entry .*out\.txt' points outside.*nothing was extracted"):
        extract_zip(archive, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [archive]


def test_zip_with_symbolic_link_is_refused(tmp_path):
    link = zipfile.ZipInfo("train/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(BenchmarkError, match=r"entry 'train/link' is a symbolic link"):
        extract_zip(make_zip(tmp_path / "bad.zip", link), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_zip_is_refused(tmp_path):
    (tmp_path / "no.zip").write_bytes(b"no archive")
    with pytest.raises(BenchmarkError, match=r"no\.zip cannot be read as a zip archive"):
        extract_zip(tmp_path / "no.zip", tmp_path / "out")


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
        extract_zip(tmp_path / "bad.zip", tmp_path / "out")


def test_text_is_written_as_it_is(tmp_path):
    write_text(tmp_path / "folder" / "file.txt", "first\nsecond ±\n")
    assert (tmp_path / "folder" / "file.txt").read_bytes() == "first\nsecond ±\n".encode()


def test_digests_of_text_tell_apart():
    assert digest_text("ab", "c") != digest_text("a", "bc")
