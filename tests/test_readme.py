"""Pages say what is so: their code runs, their commands are understood, their links lead somewhere."""

import contextlib
import importlib
import io
import pkgutil
import re
import shlex
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cat_plugin import apply_cat
from tests.cat_plugin.helpers import images, model_pair
from tests.pages import PAGES, ROOT, Block, anchor_of, blocks_of, headings_of, links_of, names_for

README, PLUGIN, _, BENCHMARKS, _ = PAGES
NEEDED = {PLUGIN: ("matplotlib", "onnxscript")}
MOST_LINES, MOST_BYTES = 250, 12_000


def readable(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def run(block: Block, page: Path, names: dict) -> None:
    """Runs a block; a traceback shows the line of the page."""
    exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)


def masked(text: str) -> str:
    """Without figures, which depend on machine and versions."""
    return re.sub(r"[+-]?\d[\d.,]*(e[+-]?\d+)?", "#", text).strip()


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder, a global random state and a group of processes that no other test sees."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    with torch.random.fork_rng():
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", PAGES, ids=readable)
def test_python_blocks_run_in_order(page, alone):
    for module in NEEDED.get(page, ()):
        pytest.importorskip(module)
    names = names_for(page)
    for block in blocks_of(page.read_text("utf-8"), "python"):
        if block.reason is None:
            run(block, page, names)
        else:
            compile(block.code, str(page), "exec")
            assert re.match(r"needs \w+.*\w", block.reason), f"{readable(page)}:{block.line} does not say why"
    for test in [value for name, value in names.items() if name.startswith("test_") and callable(value)]:
        test()


def test_the_quickstart_prints_what_the_page_shows(alone):
    text, names, printed = README.read_text("utf-8"), {}, io.StringIO()
    network, quickstart = blocks_of(text, "python")
    with contextlib.redirect_stdout(printed):
        run(network, README, names)
        run(quickstart, README, names)
    (shown,) = (block.code for block in blocks_of(text, "text") if block.heading == "Quickstart")
    assert masked(printed.getvalue()) == masked(shown)
    assert names["cat_model"].report.accuracy.paired.delta > 0
    assert len(quickstart.code.strip().splitlines()) <= 12


def test_save_load_deploy(alone):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    quantized_model, fp_model = (model.eval() for model in model_pair())
    fresh = images(37, seed=1)
    found = [block for block in blocks_of(PLUGIN.read_text("utf-8"), "python") if block.reason is None]
    deploy, keep = (block for block in found if block.heading == "Save, load, deploy")

    names = {"torch": torch, "images": images(4), "calib_loader": images(400), "apply_cat": apply_cat}
    names |= {"quantized_model": quantized_model, "fp_model": fp_model}
    run(deploy, PLUGIN, names)
    with torch.no_grad():
        expected = quantized_model(fresh)
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    (onnx,) = session.run(None, {"x": fresh.numpy()})
    for found in (names["baked"](fresh), names["program"].module()(fresh), torch.from_numpy(onnx)):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0.0)

    names["class_names"] = [f"class {index}" for index in range(10)]
    run(keep, PLUGIN, names)
    assert names["cat_model"].class_names[3] == "class 3"
    assert torch.equal(quantized_model(fresh), expected)


def commands_of(text: str) -> list[list[str]]:
    """Words of all lines in shell blocks, of those that go on in the next line together; of a variable that an earlier
    line has set, its words."""
    code = "".join(block.code for block in blocks_of(text, "bash")).replace("\\\n", " ")
    variables: dict[str, list[str]] = {}
    found = []
    for words in filter(None, (shlex.split(line, comments=True) for line in code.splitlines())):
        name, is_set, value = words[0].partition("=")
        if is_set and len(words) == 1:
            variables[f"${name}"] = value.split()
        else:
            found.append([part for word in words for part in variables.get(word, [word])])
    return found


def parser_of(command: str) -> Callable:
    """The function that reads the options of a command."""
    from benchmarks import commands

    modules = [
        importlib.import_module(f"{commands.__name__}.{each.name}") for each in pkgutil.iter_modules(commands.__path__)
    ]
    return next(vars(module)[f"parse_{command}"] for module in modules if f"parse_{command}" in vars(module))


@pytest.mark.parametrize("page", PAGES, ids=readable)
def test_commands_are_understood(page):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for words in commands_of(page.read_text("utf-8")):
        if words[0] == "make":
            assert words[1] in targets
        if "benchmarks" in words and "-m" in words:
            command, *given = words[words.index("benchmarks") + 1 :] or ["compare"]
            here = {"cuda": "cpu", "$model": "resnet18"}
            parser_of(command)([here.get(word, word) for word in given])


@pytest.mark.parametrize("page", PAGES, ids=readable)
def test_links_lead_somewhere(page):
    for link in links_of(page.read_text("utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in map(anchor_of, headings_of(target.read_text("utf-8"))), link


def test_the_first_page_is_short():
    text = README.read_text("utf-8")
    assert text.count("\n") <= MOST_LINES and len(text.encode()) <= MOST_BYTES


@pytest.mark.parametrize("package", ["cat_plugin", "baselines"])
def test_rooms_are_those_of_the_package(package):
    text = (ROOT / package / "README.md").read_text("utf-8").split("## Rooms\n")[1]
    folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert set(re.findall(r"^\| \[`(\w+)/`\]", text, re.M)) == folders


def test_warnings_of_the_table_are_given():
    code = "".join(path.read_text("utf-8") for path in (ROOT / "cat_plugin").rglob("*.py"))
    table = PLUGIN.read_text("utf-8").split("## Warnings\n")[1].split("## ")[0]
    phrases = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    assert len(phrases) > 5 and [phrase for phrase in phrases if phrase not in code] == []


def test_the_picture_shows_the_table():
    text = BENCHMARKS.read_text("utf-8").split("### How much a correction depends on its images\n")[1]
    rows = re.findall(r"^\| ([\d,]+) +\| ([\w ()]+?) +\| +(\S+) \| +(\S+) \|", text.split("![")[0], re.M)
    picture = ElementTree.parse(ROOT / "benchmarks" / "figures" / "gain-by-images.svg")
    marks = [mark for mark in picture.iter() if "data-images" in mark.attrib]
    keys = [f"data-{name}" for name in ("images", "correction", "mean", "worst")]
    shown = {tuple(mark.get(key) for key in keys) for mark in marks}
    assert shown == {(count.replace(",", ""), *others) for count, *others in rows}

    ends = [re.fullmatch(r"M([\d.]+) ([\d.]+)V([\d.]+)", mark.get("d")).groups() for mark in marks]
    heights = np.array([[end[1], end[2]] for end in ends], dtype=float).ravel()
    gains = np.array([[mark.get("data-mean"), mark.get("data-worst")] for mark in marks], dtype=float).ravel()
    slope, offset = np.polyfit(gains, heights, 1)
    assert slope < 0 and np.abs(slope * gains + offset - heights).max() < 0.1


def test_blocks_headings_and_links_are_found():
    text = "# A b: `c`\n[x](y#z)\n<!-- not run: needs w, v -->\n  ```python\n  # no heading\n  [k](l)\n  ```\n"
    assert blocks_of(text, "python") == [Block("python", "# no heading\n[k](l)\n", 5, "A b: `c`", "needs w, v")]
    assert blocks_of(text, "bash") == []
    assert headings_of(text) == ["A b: `c`"] and anchor_of("A b: `c`") == "a-b-c"
    assert links_of(text) == ["y#z"]
    assert commands_of("```bash\nmake a b \\\n  c  # d\n```\n") == [["make", "a", "b", "c"]]
    assert commands_of('```bash\nX="a b"\nmake $X $Y\n```\n') == [["make", "a", "b", "$Y"]]
