"""The rules that the folder listing promises: arrows between packages, clean top level, library habits."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("cat_plugin", "baselines")
PACKAGES = (*LIBRARIES, "benchmarks")
MAY_IMPORT = {"cat_plugin": set(), "baselines": set(), "benchmarks": {"cat_plugin", "baselines"}}
TOP_LEVEL = {
    *(".ci", ".git", ".github", ".gitignore", "CHANGELOG.md", "LICENSE", "Makefile", "README.md"),
    *("baselines", "benchmarks", "cat_plugin", "ruff.toml", "setup.cfg", "setup.py", "tests"),
}


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def readable(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(code: str) -> Iterator[str]:
    """Absolute modules that the code imports, ``from a import b`` as ``a.b``; relative imports stay in the package."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called_names(code: str) -> Iterator[tuple[str, ast.Call]]:
    """Calls with the name as it is written, such as ``torch.load``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def unsafe_loads(code: str) -> list[int]:
    """Lines that call ``torch.load`` without ``weights_only=True``."""
    return [
        call.lineno
        for name, call in called_names(code)
        if name == "torch.load" and "weights_only=True" not in [ast.unparse(keyword) for keyword in call.keywords]
    ]


def device_literals(code: str) -> list[int]:
    """Lines with a string that names a CUDA device, or a call of ``.cuda()``; docstrings may speak of it."""
    literals = [
        node.lineno
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] == "cuda"
    ]
    return literals + [call.lineno for name, call in called_names(code) if name.endswith(".cuda")]


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=readable)
def test_packages_import_only_along_the_arrows(path):
    package = path.relative_to(ROOT).parts[0]
    roots = {name.split(".")[0] for name in imported_modules(path.read_text("utf-8"))}
    forbidden = ({*PACKAGES, "tests"} - {package} - MAY_IMPORT[package]) & roots
    assert not forbidden, f"{readable(path)} imports {sorted(forbidden)}"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=readable)
def test_nothing_is_unpickled(path):
    code = path.read_text("utf-8")
    roots = {name.split(".")[0] for name in imported_modules(code)}
    assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}
    assert not unsafe_loads(code), "torch.load without weights_only=True"


@pytest.mark.parametrize("path", sources(*LIBRARIES), ids=readable)
def test_libraries_do_not_print_and_name_no_device(path):
    code = path.read_text("utf-8")
    assert "print" not in [name for name, _ in called_names(code)]
    assert not device_literals(code)


@pytest.mark.parametrize("path", sources("benchmarks"), ids=readable)
def test_only_command_lines_print(path):
    if path.stem not in ("__main__", "ablate", "command", "compare", "fits", "recompute", "robustness", "speed"):
        assert "print" not in [name for name, _ in called_names(path.read_text("utf-8"))]


def test_top_level_holds_only_what_belongs_there():
    lines = (ROOT / ".gitignore").read_text("utf-8").splitlines()
    ignored = [line.rstrip("/") for line in lines if line and not line.startswith("#")]
    found = {entry.name for entry in ROOT.iterdir()}
    stray = sorted(name for name in found - TOP_LEVEL if not any(fnmatch(name, pattern) for pattern in ignored))
    assert not stray, f"add to TOP_LEVEL what belongs at the top: {stray}"


def test_every_package_is_found():
    assert all(sources(package) for package in PACKAGES)


def test_checks_find_what_they_look_for():
    code = "import a.b\nfrom c import d\nfrom .e import f\nprint(1)\nx = 'cuda:0'\nm.cuda()\ntorch.load(p)\n"
    assert list(imported_modules(code)) == ["a.b", "c.d"]
    assert [name for name, _ in called_names(code)] == ["print", "m.cuda", "torch.load"]
    assert device_literals(code) == [5, 6]
    assert unsafe_loads(code) == [7]
    assert unsafe_loads("torch.load(p, weights_only=False)") == [1]
    assert unsafe_loads("torch.load(p, weights_only=True)") == []
