"""Text files written whole or not at all, archives extracted only inside their folder, digests of text."""

import hashlib
import lzma
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from baselines.files import atomic_path
from benchmarks import BenchmarkError


def write_text(target: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(text.encode())


def extract_zip(archive: Path, folder: Path) -> None:
    """Extract a zip archive into `folder`.

    Raises:
        BenchmarkError: one of the entries is a symbolic link or would land outside `folder`, and nothing has been
            extracted; or the file is not a readable zip archive, is damaged, or cannot be written out.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                _refuse_escape(archive, entry)
            opened.extractall(folder)
    except (zipfile.BadZipFile, RuntimeError, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        # OSError: a full disk, or an entry that is a file and a folder. EOFError comes without a message.
        raise BenchmarkError(f"{archive} cannot be read as a zip archive: {str(error) or 'it is cut off'}") from error


def _refuse_escape(archive: Path, entry: zipfile.ZipInfo) -> None:
    # Both flavours of path, because an archive made on Windows may separate by backslashes.
    flavours = PurePosixPath(entry.filename), PureWindowsPath(entry.filename)
    if any(path.anchor or ".." in path.parts for path in flavours):
        raise BenchmarkError(f"{archive}: entry {entry.filename!r} points outside the archive; nothing was extracted")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise BenchmarkError(f"{archive}: entry {entry.filename!r} is a symbolic link; nothing was extracted")


def digest_text(*texts: str) -> str:
    """SHA-256 of the texts, each delimited, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(f"{len(encoded)}:".encode() + encoded)
    return digest.hexdigest()[:16]
