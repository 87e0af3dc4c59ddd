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
ROOMS = {
    "cat_plugin": "api wrapper evaluation | report | layers saving | fitting | correction | running "
    "| config metrics kinds errors",
    "baselines": "api | summary inputs | reconstruction | quantization | network | recipes versions files graphs",
    "benchmarks": "__main__ perf | commands | reports | measure | networks | datasets | runs | anchors wording",
}
"""Folders and modules of each package, from those that use to those that are used: a room imports its own modules and
rooms to the right of it, and modules of one group, which are no folders, import each other."""
MOST_NAMES = 13
"""In a folder, `__init__.py` and pages aside."""
TOP_LEVEL = {
    *(".ci", ".git", ".github", ".gitignore", "CHANGELOG.md", "LICENSE", "Makefile", "README.md"),
    *("baselines", "benchmarks", "cat_plugin", "ruff.toml", "setup.cfg", "setup.py", "tests"),
}


def sources(*packages: str, root: Path = ROOT) -> list[Path]:
    return sorted(path for package in packages for path in (root / package).rglob("*.py"))


def readable(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(code: str) -> Iterator[str]:
    """Absolute modules that the code imports, ``from a import b`` as ``a.b``; relative imports stay in the package."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(package: str, root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """Imports inside a package, as pairs of modules such as ``fitting.auto`` and ``running.taps``."""
    modules = {".".join(path.relative_to(root / package).with_suffix("").parts) for path in sources(package, root=root)}
    for path in sources(package, root=root):
        here = ".".join(path.relative_to(root / package).with_suffix("").parts)
        for name in imported_modules(path.read_text("utf-8")):
            parts = name.split(".")
            if parts[0] != package or here == "__init__":
                continue
            there = next((".".join(parts[1:end]) for end in (3, 2) if ".".join(parts[1:end]) in modules), None)
            if there not in (None, here):
                yield here, there


def backward(pairs: Iterator[tuple[str, str]], rooms: str) -> list[tuple[str, str]]:
    """The pairs that ``rooms``, as in ``ROOMS``, does not allow."""
    rank = {room: place for place, group in enumerate(rooms.split("|")) for room in group.split()}

    def allowed(here: str, there: str) -> bool:
        own, other = here.split(".")[0], there.split(".")[0]
        same = own == other or (own == here and other == there and rank[own] == rank[other])
        return same or rank[own] < rank[other]

    return [pair for pair in pairs if not allowed(*pair)]


def circles(pairs: Iterator[tuple[str, str]]) -> list[str]:
    """Modules that import themselves by way of others."""
    targets: dict[str, set[str]] = {}
    for here, there in pairs:
        targets.setdefault(here, set()).add(there)

    def reached(start: str) -> set[str]:
        found, left = set(), [start]
        while left:
            new = targets.get(left.pop(), set()) - found
            found |= new
            left += new
        return found

    return sorted(module for module in targets if module in reached(module))


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


def without_device(code: str) -> list[int]:
    """Lines that make a tensor wherever `torch.set_default_device` says; examples in docstrings may."""
    makers = (
        "zeros",
        "ones",
        "empty",
        "full",
        "arange",
        "linspace",
        "tensor",
        "as_tensor",
        "eye",
        "rand",
        "randn",
        "randint",
        "randperm",
    )
    return [
        call.lineno
        for name, call in called_names(code)
        if name in [f"torch.{maker}" for maker in makers]
        if "device" not in [keyword.arg for keyword in call.keywords]
    ]


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=readable)
def test_packages_import_only_along_the_arrows(path):
    package = path.relative_to(ROOT).parts[0]
    roots = {name.split(".")[0] for name in imported_modules(path.read_text("utf-8"))}
    forbidden = ({*PACKAGES, "tests"} - {package} - MAY_IMPORT[package]) & roots
    assert not forbidden, f"{readable(path)} imports {sorted(forbidden)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_only_what_is_to_the_right_of_them(package):
    assert not backward(arrows(package), ROOMS[package])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_by_way_of_others(package):
    assert not circles(arrows(package))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_folder_is_understood_at_a_glance(package):
    for folder in {path.parent for path in sources(package)}:
        names = [entry.stem for entry in folder.iterdir() if entry.is_dir() or entry.suffix == ".py"]
        names = [name for name in names if name not in ("__init__", "__pycache__")]
        assert len(names) <= MOST_NAMES, f"{readable(folder)} holds {len(names)} names"
    rooms = set(ROOMS[package].replace("|", " ").split())
    found = {path.relative_to(ROOT / package).parts[0].removesuffix(".py") for path in sources(package)}
    assert found - {"__init__"} == rooms


def test_planted_arrow_and_circle_are_found(tmp_path):
    code = {
        "cat_plugin/running/taps.py": "from cat_plugin.correction.hook import CATHook\n",
        "cat_plugin/correction/hook.py": "def f():\n    from cat_plugin.running import taps\n",
        "cat_plugin/wrapper.py": "import cat_plugin.evaluation\nfrom cat_plugin.errors import CATError\n",
        "cat_plugin/evaluation.py": "from cat_plugin.fitting.fit import fit\n",
        "cat_plugin/fitting/fit.py": "from cat_plugin.saving.files import replacing\n",
        "cat_plugin/saving/files.py": "",
        "cat_plugin/errors.py": "",
    }
    for name, text in code.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = list(arrows("cat_plugin", tmp_path))
    assert len(found) == 6
    assert backward(found, ROOMS["cat_plugin"]) == [
        ("fitting.fit", "saving.files"),
        ("running.taps", "correction.hook"),
    ]
    assert circles(found) == ["correction.hook", "running.taps"]


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


@pytest.mark.parametrize("path", sources(*LIBRARIES), ids=readable)
def test_tensors_are_made_on_a_device_that_is_named(path):
    assert not without_device(path.read_text("utf-8"))


@pytest.mark.parametrize("path", sources("benchmarks"), ids=readable)
def test_only_command_lines_print(path):
    if path.stem not in ("__main__", "compare", "exit_codes", "fits", "loading", "report", "robustness", "speed"):
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
    assert without_device("torch.zeros(1)\ntorch.arange(2, device=d)\nx.new_zeros(1)\nx = torch.eye(2)") == [1, 4]
    assert unsafe_loads("torch.load(p, weights_only=False)") == [1]
    assert unsafe_loads("torch.load(p, weights_only=True)") == []
