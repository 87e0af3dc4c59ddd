"""What a figure depends on besides the settings: versions, sources, machine."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import digest_text

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("cat_plugin", "baselines", "benchmarks")
LIBRARIES = ("torchvision", "numpy", "scikit-learn", "scipy")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that take part in a figure."""
    # torch's own attribute names the build too, which the metadata leaves out.
    own = {"python": platform.python_version(), "torch": torch.__version__}
    return own | {name: metadata.version(name) for name in LIBRARIES}


def source_digest(*packages: str) -> str:
    """Digest of all Python files of ``packages``, by default of all three: changes with any edit."""
    paths = sorted(path for package in packages or SOURCES for path in (ROOT / package).rglob("*.py"))
    return digest_text(
        *(text for path in paths for text in (path.relative_to(ROOT).as_posix(), path.read_text("utf-8")))
    )


def describe_machine() -> dict[str, Any]:
    """Platform, processors, threads, and the commit of the clone where there is one."""
    return {
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
