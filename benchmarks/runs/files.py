"""Text files written whole or not at all, digests of text."""

import hashlib
from pathlib import Path

from baselines.files import atomic_path


def write_text(target: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(text.encode())


def digest_text(*texts: str) -> str:
    """SHA-256 of the texts, each delimited, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(f"{len(encoded)}:".encode() + encoded)
    return digest.hexdigest()[:16]
