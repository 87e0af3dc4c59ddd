"""Tables made again from stored predictions, without running models, are the same to the last character."""

import json
import sys
from dataclasses import replace

import pytest

from benchmarks.commands import ablate, compare, nulls, report, robustness
from benchmarks.commands.report import main
from benchmarks.datasets.registry import DATASETS
from benchmarks.measure.nulls import CASES, LogitsCase
from benchmarks.measure.protocol import Setting
from benchmarks.reports.comparison_report import to_markdown
from tests.benchmarks.logits import write_npz
from tests.benchmarks.rows import make_measurement

FIGURES = (".csv", ".md")


def tables(run):
    return {path.name: path.read_text() for path in run.iterdir() if path.suffix in FIGURES or "results" in path.name}


@pytest.fixture
def runs(tiny, tmp_path, monkeypatch):
    """Folders of a run of each command, by its name; no figures are drawn."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(CASES, "plain", LogitsCase(name="plain", images=(20,), classes=3))
    write_npz(tmp_path / "in" / "a.npz", 150)
    files = ["--logits", str(tmp_path / "in"), "--skip", "20", "--cache", str(tmp_path / "cache"), "--no-progress"]
    results = ["--results", str(tmp_path / "runs")]
    commands = {
        "compare": (compare, [*tiny, "--methods", "rtn", "--bits", "2/4", "--seeds", "0", "1", "--n-cat", "44"]),
        "ablate": (ablate, [*files, "--n-cat", "64", "--factors", "alpha=0.5,1", "images=32,64", "origin"]),
        "robustness": (robustness, [*files, "--images", "32", "64"]),
        "nulls": (nulls, ["--cases", "plain", "--draws", "2", *files[4:]]),
    }

    def run(name):
        module, options = commands[name]
        assert module.main([*options, *results, "--run", name]) == 0
        return tmp_path / "runs" / name

    return run


@pytest.fixture
def no_models(monkeypatch):
    """Neither networks nor fits nor data sets are to be had."""

    def refuse(*args, **options):
        raise AssertionError("something was measured again")

    for name in (
        "benchmarks.measure.leak_guard.fit_cluster_affine",
        "benchmarks.measure.leak_guard.fit_and_score",
        "benchmarks.measure.network_logits.collect_outputs",
        "benchmarks.measure.logit_files.np.load",
        "benchmarks.commands.loading.load_pretrained",
        "benchmarks.commands.loading.trained_model",
    ):
        monkeypatch.setattr(name, refuse)
    for name, description in DATASETS.items():
        monkeypatch.setitem(DATASETS, name, replace(description, load=refuse))


@pytest.mark.parametrize("command", ["compare", "ablate", "robustness", "nulls"])
def test_tables_are_the_same(runs, command, request, capsys):
    run = runs(command)
    request.getfixturevalue("no_models")
    expected = tables(run)
    assert len(expected) >= 2
    for name in expected:
        (run / name).unlink()
    capsys.readouterr()
    assert main([str(run)]) == 0
    assert tables(run) == expected
    assert "(written)" in (printed := capsys.readouterr().out) and "(the same)" not in printed
    assert main([str(run)]) == 0
    assert "(written)" not in capsys.readouterr().out


def test_runs_of_one_network_share_a_table_unless_they_measured_the_same(tmp_path, capsys):
    seeds = [
        [make_measurement(Setting("rtn", 2, 2, seed)) for seed in (0, 1)],
        [make_measurement(Setting("qdrop", 2, 2, seed), won=30) for seed in (0, 1)],
        [make_measurement(Setting("rtn", 2, 2, seed), won=40) for seed in (0, 1)],
        [make_measurement(Setting("rtn", 2, 4, 0))],
    ]
    for index, measured in enumerate(seeds):
        grid = [f"cell{place}" for place in range(len(measured))]
        for name, measurement in zip(grid, measured, strict=True):
            measurement.store(tmp_path / str(index) / "rows" / f"{name}.json")
        (tmp_path / str(index) / "settings.json").write_text(json.dumps({"grid": grid}))
    assert main([str(tmp_path / name) for name in "0123"]) == 0
    printed = capsys.readouterr().out
    for measured in (seeds[0] + seeds[1], seeds[2], seeds[3]):
        assert to_markdown(measured) in printed
    assert printed.count("Top-1 in percent") == 3


@pytest.mark.parametrize(
    ("digests", "said"),
    [
        (
            [{"code_digest": "a"}, {"code_digest": "b"}, {"code_digest": "a"}],
            "definition of the network: {0}, {2}; {1}.",
        ),
        ([{"network_digest": "a"}, {"network_digest": "b"}], "definition of the network: {0}; {1}."),
        ([{"code_digest": "a"}, {"code_digest": "a"}], None),
        ([{"code_digest": "a"}], None),
    ],
    ids=["code", "network", "same", "one"],
)
def test_a_table_of_runs_by_different_code_says_so(tmp_path, capsys, digests, said):
    folders = [tmp_path / str(index) for index in range(len(digests))]
    for method, folder, made_by in zip(("rtn", "brecq", "qdrop"), folders, digests, strict=False):
        make_measurement(Setting(method, 2, 2, 0)).store(folder / "rows" / "cell.json")
        (folder / "settings.json").write_text(json.dumps({"grid": ["cell"], **made_by}))
    assert main([str(folder) for folder in folders]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Top-1 in percent") == 1
    assert said.format(*folders) in printed if said else "Not all by the same code" not in printed


def change(run, **figures):
    """Change a stored row."""
    path = sorted((run / "rows").glob("*.json"))[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | figures))
    return path.stem


@pytest.mark.parametrize(
    ("command", "figure"),
    [("compare", "lq_top1"), ("ablate", "ci_low"), ("robustness", "won"), ("nulls", "change")],
)
def test_row_that_does_not_hold_the_figures_of_its_predictions_is_found(runs, capsys, command, figure):
    run = runs(command)
    expected, name = tables(run), change(run, **{figure: 3.25})
    assert main([str(run)]) == 2
    error = capsys.readouterr().err
    assert f"the row {name} does not hold the figures of its predictions: {figure} 3.25 instead of" in error
    assert tables(run) == expected


def test_unfinished_run_is_refused(runs, capsys):
    run = runs("robustness")
    first = sorted((run / "rows").glob("*.json"))[0]
    first.unlink()
    assert main([str(run)]) == 2
    assert f"lacks 1 of 14 rows, such as {first.stem}; the command that started" in capsys.readouterr().err


def test_run_of_an_earlier_version_is_one_of_compare(runs, tmp_path):
    run = runs("compare")
    expected = tables(run)
    settings = json.loads((run / "settings.json").read_text())
    del settings["kind"]
    (run / "settings.json").write_text(json.dumps(settings))
    assert main([str(run)]) == 0 and tables(run) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not the folder of a run"),
        ("[]", "is not the folder of a run"),
        ('{"kind": "x"}', "is no run of compare"),
    ],
)
def test_other_folders_are_refused(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    assert main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_runs_of_other_weights_have_tables_of_their_own():
    tables, one, other = [], *(make_measurement(Setting(method, 2, 2, 0)) for method in ("rtn", "qdrop"))
    report._join(tables, [one], "V1")
    report._join(tables, [other], "V2")
    assert tables == [("V1", [one]), ("V2", [other])]
    report._join(tables, [other], "V1")
    assert tables[0] == ("V1", [one, other])
