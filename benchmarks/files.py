"""Files written whole or not at all, archives extracted only inside their folder, digests."""

import hashlib
import lzma
import os
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from torch import Tensor

from benchmarks import BenchmarkError


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary name beside ``target``, renamed to it when the block ends, removed when the block raises."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(text.encode())


def extract_zip(archive: Path, folder: Path) -> None:
    """Extract a zip archive into ``folder``.

    Raises:
        BenchmarkError: one of the entries is a symbolic link or would land outside ``folder``, and nothing has been
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


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, as 16 hexadecimal digits; independent of the order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
