"""What a digest of code depends on."""

from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from benchmarks.runs import environment
from benchmarks.runs.environment import code_digest, describe_machine, quantizing_versions, versions


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A repository: `benchmarks.a` imports `benchmarks.b`, in a function, which imports `cat_plugin.c`."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    files = {
        "benchmarks/__init__.py": "",
        "benchmarks/a.py": "def f():\n    from benchmarks.b import x\n",
        "benchmarks/b.py": "import numpy\nimport cat_plugin.c as d\n",
        "benchmarks/other.py": "from benchmarks import a\n",
        "cat_plugin/__init__.py": "from cat_plugin.e import y\n",
        "cat_plugin/c.py": "",
        "cat_plugin/e.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code_digest.cache_clear()
    yield tmp_path
    code_digest.cache_clear()


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("benchmarks/a.py", True),
        ("benchmarks/b.py", True),
        ("benchmarks/__init__.py", True),
        ("cat_plugin/c.py", True),
        ("cat_plugin/__init__.py", True),
        ("cat_plugin/e.py", True),
        ("benchmarks/other.py", False),
    ],
)
def test_code_counts_if_it_is_imported(package, name, matters):
    before = code_digest("benchmarks.a")
    (package / name).write_text((package / name).read_text() + "# changed\n")
    code_digest.cache_clear()
    assert (code_digest("benchmarks.a") != before) == matters


def test_figures_of_this_repository_depend_on_what_they_should():
    names = (
        code_digest("benchmarks.measure.accuracy"),
        code_digest("benchmarks.measure.draws"),
        code_digest("benchmarks.reports.plots"),
    )
    assert len(set(names)) == 3


def test_versions_are_those_of_all_that_takes_part(monkeypatch):
    assert versions()["pillow"] == metadata.version("pillow")
    assert versions().keys() == {*quantizing_versions(), "pillow", "timm"}
    real = metadata.version

    def without_timm(name):
        if name == "timm":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", without_timm)
    assert versions()["timm"] is None


def test_machine_has_the_name_of_the_accelerator(monkeypatch):
    assert describe_machine()["accelerator"] is None
    monkeypatch.setattr(torch, "xpu", SimpleNamespace(get_device_name=lambda device: f"name of {device}"))
    assert describe_machine("xpu:1")["accelerator"] == "name of xpu:1"
