"""A run that is killed, wherever it is killed, ends with the table of a run that was left alone."""

import os
import re
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from benchmarks.commands import ablate, compare
from benchmarks.commands.parsers import parse_compare
from benchmarks.measure import leak_guard
from benchmarks.runs.environment import ROOT
from cat_plugin import CATConfig
from tests.benchmarks.logits import write_npz
from tests.benchmarks.rows import make_measurement


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def tables(folder: Path) -> dict[str, str]:
    """All that a run leaves, but for what tells the time, and figures."""
    (run,) = folder.iterdir()
    kept = [path for path in run.rglob("*") if path.suffix in (".csv", ".md", ".json") and path.is_file()]
    timeless = {str(path.relative_to(run)): re.sub(r'"seconds": [0-9.e-]+', "", path.read_text()) for path in kept}
    return {name: text for name, text in timeless.items() if name != "environment.json"}


@pytest.fixture
def comparison(tiny, monkeypatch):
    """A comparison whose rows cost nothing."""
    loaded = compare.load_network(parse_compare(tiny))
    monkeypatch.setattr(compare, "load_network", lambda args, needs: loaded)
    monkeypatch.setattr(
        compare, "measure", lambda setting, *args, **kwargs: make_measurement(setting, won=setting.seed)
    )
    return lambda results: compare.main([*tiny, "--seeds", "3", "9", "--results", str(results)])


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """An ablation of two cells, which are fitted with one cluster to cost next to nothing."""
    real = leak_guard.fit_cluster_affine

    def cheap(q, f, config):
        return real(q, f, CATConfig.paper(1, alpha=config.alpha))

    monkeypatch.setattr(leak_guard, "fit_cluster_affine", cheap)
    monkeypatch.setattr("benchmarks.reports.ablation_report.plot", lambda *args: False)
    write_npz(tmp_path / "in" / "a.npz", 60)
    options = ["--logits", str(tmp_path / "in"), "--skip", "10", "--n-cat", "25", "--max-draws", "1", "--no-progress"]
    options += ["--factors", "alpha=0.5,1"]
    return lambda results: ablate.main([*options, "--results", str(results), "--cache", str(results) + "-cache"])


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["comparison", "ablation"])
def test_killed_at_any_store_and_started_again_it_ends_with_the_same_table(request, tmp_path, monkeypatch, kind, late):
    run, real = request.getfixturevalue(kind), Path.replace
    assert run(tmp_path / "whole") == 0
    expected = tables(tmp_path / "whole")
    for point in count(1):
        stores = count(1)

        def replace(self, target, at=point, stores=stores):
            """Kills the run where the file of number `at` gets its name."""
            fatal = next(stores) == at
            if fatal and not late:
                raise Killed
            result = real(self, target)
            if fatal:
                raise Killed
            return result

        results = tmp_path / f"{kind}-{point}"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            try:
                assert run(results) == 0
                break  # as many stores as there are have been tried
            except Killed:
                pass
        assert run(results) == 0
        assert tables(results) == expected
    assert point > 8


def test_finished_run_is_not_touched(comparison, tmp_path):
    assert comparison(tmp_path / "results") == 0
    (run,) = (tmp_path / "results").iterdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    changed = {path: path.stat().st_mtime_ns for path in before if path.suffix in (".csv", ".md", ".safetensors")}
    assert comparison(tmp_path / "results") == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert all(path.stat().st_mtime_ns == then for path, then in changed.items())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_killed_process_leaves_a_run_that_resumes(tiny, tmp_path, capsys):
    options = [*tiny, "--seeds", "0", "1", "2", "--modes", "plain_affine", "--cache", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "benchmarks", "compare", *options]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        while process.poll() is None and not list((tmp_path / "results").glob("*/rows/*.json")):
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    assert compare.main(options) == 0
    assert "of 3 rows are finished already" in capsys.readouterr().out
    assert compare.main([*options, "--results", str(tmp_path / "whole"), "--cache", str(tmp_path / "other")]) == 0
    found, expected = tables(tmp_path / "results"), tables(tmp_path / "whole")
    names = ("results.csv", "comparisons.csv", "summary.csv", "results.md", "results.json")
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}
