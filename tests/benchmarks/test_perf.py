"""What `make perf` compares with and how it tells growth; nothing is timed here."""

import csv
import math

import numpy as np
import pytest
import torch

from benchmarks.perf import naive
from benchmarks.perf.growth import AXES, READS, Size, along, exponent, lines, sizes, to_markdown, write_growth
from benchmarks.perf.timings import Medians, copy_of, paired_logits
from cat_plugin import CATConfig, fit_cluster_affine
from cat_plugin.fitting.least_squares import fit_affine
from tests.reference import PaperCAT, lstsq_per_cluster


def test_maps_in_loops_are_ours_and_least_squares():
    q, f = (logits.double() for logits in paired_logits(300, 7))
    ids = torch.arange(300) % 5
    found = naive.fit_affine(q.numpy(), f.numpy(), ids.numpy(), 6)
    for ours, loops in zip(fit_affine(q, f, ids, 6), found, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(loops))
    for slow, loops in zip(lstsq_per_cluster(q.numpy(), f.numpy(), ids.numpy(), 6), found, strict=True):
        np.testing.assert_allclose(loops, slow, rtol=1e-8, atol=1e-8)
    assert (found[0][5] == 1).all() and not found[1][5].any(), "a cluster without images"


@pytest.mark.parametrize("pca_dim", [4, 50])
def test_recipe_in_loops_is_ours_and_the_reference(pca_dim):
    q, f = (logits.double() for logits in paired_logits(400, 9))
    slow = naive.Paper.fit(q.numpy(), f.numpy(), 8, pca_dim, 0.6).apply(q.numpy())
    ours = fit_cluster_affine(q, f, CATConfig.paper(8, pca_dim, 0.6))(q)
    torch.testing.assert_close(ours, torch.from_numpy(slow))
    reference = PaperCAT(8, pca_dim, 0.6).fit(q.numpy(), f.numpy()).apply(q.numpy())
    np.testing.assert_allclose(slow, reference, rtol=1e-9, atol=1e-9)


def test_copy_is_of_everything_into_other_memory():
    q, f = paired_logits(20, 3)
    call = copy_of(q, f)
    copies = call.__closure__[0].cell_contents
    assert all(copy.data_ptr() not in (q.data_ptr(), f.data_ptr()) for copy in copies)
    call()
    assert all(torch.equal(copy, given) for copy, given in zip(copies, (q, f), strict=True))


def test_medians_of_what_was_timed_alone():
    medians = Medians()
    stats = type("Stats", (), {"median": 0.25})
    medians.keep("a", type("Benchmark", (), {"stats": type("Metadata", (), {"stats": stats})}))
    medians.keep("b", type("Benchmark", (), {"stats": None}))
    assert medians == {"a": 0.25}


@pytest.mark.parametrize("power", [0, 1, 2, 0.5])
def test_exponent_of_a_power(power):
    values = (10, 100, 4000, 65536)
    assert exponent(values, [3e-6 * value**power for value in values]) == pytest.approx(power, abs=1e-12)


def test_exponent_of_timings_that_vary():
    values, noise = (1, 2, 4, 8, 16), (1.1, 0.9, 1.05, 0.97, 1.0)
    seconds = [value**1.5 * factor for value, factor in zip(values, noise, strict=True)]
    expected = np.polyfit(np.log(values), np.log(seconds), 1)[0]
    assert exponent(values, seconds) == pytest.approx(expected)
    assert expected == pytest.approx(1.5, abs=0.1) and expected != pytest.approx(1.5, abs=1e-3)


@pytest.mark.parametrize(("values", "seconds"), [((5,), (1.0,)), ((5, 5), (1.0, 2.0)), ((1, 2), (1.0, 0.0))], ids=str)
def test_exponent_that_cannot_be_told(values, seconds):
    with pytest.raises(ValueError, match="expected positive ones, two or more"):
        exponent(values, seconds)


POWERS = {"copy": (1, 1, 0), "apply": (1, 1, 0.5), "fit": (1.25, 2, 1), "selection": (0.75, 1.5, 0)}
FACTORS = {"copy": 1e-9, "apply": 5e-9, "fit": 1e-10, "selection": 1e-6}


def synthetic(operation, size):
    n, c, k = POWERS[operation]
    return FACTORS[operation] * size.images**n * size.classes**c * size.clusters**k


@pytest.fixture
def found():
    return lines({(operation, size): synthetic(operation, size) for operation in READS for size in sizes()})


def test_one_value_changes_along_an_axis():
    centre = vars(Size())
    for axis, values in AXES.items():
        changed = [{name: value for name, value in vars(size).items() if value != centre[name]} for size in along(axis)]
        assert changed == [{} if value == centre[axis] else {axis: value} for value in values]
        assert centre[axis] in values
    assert len(sizes()) == len(set(sizes())) == sum(map(len, AXES.values())) - 2


def test_lines_of_the_growth_table(found):
    assert len(found) == len(READS) * sum(map(len, AXES.values()))
    for line in found:
        size = Size(images=line.images, classes=line.classes, clusters=line.clusters)
        assert getattr(line, line.axis) == line.value
        assert line.seconds == synthetic(line.operation, size)
        assert line.us_per_row * line.images == pytest.approx(1e6 * line.seconds)
        logits = (2 if line.operation in ("fit", "selection") else 1) * line.images * line.classes
        assert line.copies == pytest.approx(line.seconds / (1e-9 * logits))
        assert line.exponent == pytest.approx(POWERS[line.operation][list(AXES).index(line.axis)], abs=1e-9)


def test_table_shows_three_figures_of_every_operation(found):
    text = to_markdown(found)
    tables = [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in part.splitlines()]
        for part in text.split("\n\n")
        if part.startswith("|")
    ]
    assert len(tables) == len(AXES) + 1
    assert tables[1][0] == ["operation", "figure", "10", "100", "1,000"]
    rows = {(row[0], row[1]): row[2:] for row in tables[1][2:]}
    assert len(rows) == 3 * len(READS) - 1
    assert rows["copy", "ms a call"] == ["0.0410", "0.410", "4.10"]
    assert rows["apply", "plain copies"] == ["40.0", "40.0", "40.0"], "5 times the square root of 64 clusters"
    expected = [1e6 * 1e-10 * 4096**0.25 * classes**2 * 64 for classes in AXES["classes"]]
    assert [float(cell.replace(",", "")) for cell in rows["fit", "us a row"]] == pytest.approx(expected, rel=0.01)
    assert tables[-1][0] == ["", "", "images", "classes", "clusters"]
    assert {row[0]: tuple(map(float, row[2:])) for row in tables[-1][2:]} == POWERS
    assert "By number of classes, at 4,096 images, 64 clusters, processor time on one thread:" in text


def test_files_of_the_growth_table(found, tmp_path):
    text = write_growth(tmp_path / "perf", found)
    assert sorted(path.name for path in (tmp_path / "perf").iterdir()) == ["growth.csv", "growth.md"]
    assert (tmp_path / "perf" / "growth.md").read_text() == text + "\n" == to_markdown(found) + "\n"
    rows = list(csv.DictReader((tmp_path / "perf" / "growth.csv").open()))
    assert [(row["axis"], row["operation"]) for row in rows] == [(line.axis, line.operation) for line in found]
    assert all(math.isclose(float(row["seconds"]), line.seconds) for row, line in zip(rows, found, strict=True))
