"""What a figure depends on besides the settings: versions, sources, machine."""

import ast
import os
import platform
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.runs.files import digest_text

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cat_plugin", "baselines", "benchmarks")
LIBRARIES = ("torchvision", "numpy", "scikit-learn", "scipy")
MORE = ("pillow", "timm")  # they decode images and make networks, but do not quantize


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that take part in a figure; None for those that are not installed."""
    return quantizing_versions() | {name: _version(name) for name in MORE}


def quantizing_versions() -> dict[str, str]:
    """Versions of those that quantization depends on, besides its network and its images."""
    # torch's own attribute names the build too, which the metadata leaves out.
    own = {"python": platform.python_version(), "torch": torch.__version__}
    return own | {name: metadata.version(name) for name in LIBRARIES}


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


@cache
def code_digest(*modules: str) -> str:
    """Digest of Python modules, by dotted name, and of all modules of this repository that they import.

    Imports are followed wherever they stand: changes with any edit that a figure may depend on.
    """
    found: dict[str, str] = {}
    waiting = [path for name in modules for path in _files(name)]
    while waiting:
        path = waiting.pop()
        key = path.relative_to(ROOT).as_posix()
        if key not in found:
            found[key] = path.read_text("utf-8")
            waiting += [each for name in _imported(found[key]) for each in _files(name)]
    return digest_text(*(text for key in sorted(found) for text in (key, found[key])))


def _imported(code: str) -> Iterator[str]:
    """Names that the code imports, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(name: str) -> list[Path]:
    """Files of this repository that an import of `name` runs: the module, where it is one, and its packages."""
    parts = name.split(".")
    if parts[0] not in PACKAGES:
        return []
    paths = [ROOT.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
    candidates = [*(path / "__init__.py" for path in paths), *(path.with_suffix(".py") for path in paths)]
    return [path for path in candidates if path.is_file()]


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Platform, processors, threads, name of the accelerator, and the commit of the clone where there is one."""
    return {
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": _accelerator(device),
        "git_commit": _git_commit(),
    }


def _accelerator(device: str) -> str | None:
    """What `device` is called, or None for the processor and where nothing says so."""
    backend = getattr(torch, torch.device(device).type, None)
    name = getattr(backend, "get_device_name", None)
    return None if name is None else name(torch.device(device))


def _git_commit() -> str | None:
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
