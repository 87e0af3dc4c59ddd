import csv
import io
import json
from dataclasses import asdict, replace

from benchmarks.measure.comparisons import compare, summarize
from benchmarks.measure.protocol import Setting
from benchmarks.reports.comparison_report import title, to_markdown, to_table, write_report
from benchmarks.reports.tables import to_csv
from tests.benchmarks.rows import cells, make_measurement

COLUMNS = (
    "dataset,model,method,w_bits,a_bits,seed,iters,n_calib,n_cat,n_eval,"
    "fp_top1,lq_top1,plain_affine_top1,cat_paper_top1,output_top1,layers_top1,output_delta,layers_delta,"
    "test_folds,reused_images,fp_top5,lq_top5,plain_affine_top5,cat_paper_top5,output_top5,layers_top5"
)


def test_csv_has_exactly_the_columns_and_leaves_unknown_values_empty():
    text = to_csv([make_measurement().row, make_measurement(cat_paper=False).row])
    assert text.splitlines()[0] == COLUMNS
    assert (
        text.splitlines()[1] == "digits,resnet8,rtn,2,2,0,9,16,1024,500,99.0,90.0,91.0,92.6,92.0,93.0,2.0,3.0,1,0,,,,,,"
    )
    assert [line["cat_paper_top1"] for line in csv.DictReader(io.StringIO(text))] == ["92.6", ""]


def test_table_has_mean_and_standard_deviation_over_seeds():
    """Gains of 1, 2 and 6 points: mean 3, standard deviation sqrt(7)."""
    won = (10, 15, 35)
    seeds = [make_measurement(Setting("qdrop", 2, 4, seed), won=won[seed]) for seed in range(3)]
    header, _, qdrop, rtn = cells(to_table([*seeds, make_measurement(won=1, lost=2, cat_paper=False)]))
    scores = ["FP", "low-bit", "+ plain affine", "+ paper", "+ output", "+ layers"]
    kinds = ["95 % interval over seeds", "p over seeds", "95 % interval of these networks", "p of these networks"]
    assert header == ["method", "bits", *scores, "gain of layers", *kinds]
    assert qdrop[:5] == ["qdrop", "W2A4", "99.00 ± 0.00", "90.00 ± 0.00", "91.00 ± 0.00"]
    assert qdrop[6] == "92.00 ± 0.00" and qdrop[7:9] == ["93.00 ± 2.65", "+3.00 ± 2.65"]
    assert rtn[:9] == ["rtn", "W2A2", "99.00", "90.00", "91.00", "-", "92.00", "89.80", "-0.20"]
    assert rtn[-1] == "1.000"


def test_table_of_several_seeds_has_both_intervals():
    measured = [make_measurement(Setting("qdrop", 2, 4, seed), won=10 + 10 * seed) for seed in range(3)]
    line, row = summarize(measured)[-1], cells(to_table(measured))[2]
    for interval, p_value, kind in ((row[-4], row[-3], "seeds"), (row[-2], row[-1], "networks")):
        low, high = (getattr(line, f"{kind}_{name}") for name in ("ci_low", "ci_high"))
        assert interval == f"{low:+.2f} to {high:+.2f}"
        assert p_value == (f"{getattr(line, f'{kind}_p_value'):.3f}" if kind == "seeds" else "<0.001")


def test_table_of_one_seed_has_one_interval():
    header, _, row = cells(to_table([make_measurement()]))
    line = summarize([make_measurement()])[-1]
    assert header[-3:] == ["gain of layers", "95 % interval", "p"]
    assert row[-2] == f"{line.networks_ci_low:+.2f} to {line.networks_ci_high:+.2f}"


def test_top5_has_a_table_of_its_own_where_there_are_many_classes():
    ranked = make_measurement(ranks={"fp": [0, 4, 5, 9], "lq": [5, 5, 5, 4], "output": [0, 0, 0, 7], "layers": [1] * 4})
    text = to_markdown([ranked])
    assert "Top-5 in percent:" in text
    heading, _, line = cells(text.partition("Top-5 in percent:\n\n")[2])
    assert heading == ["method", "bits", "FP", "low-bit", "+ plain affine", "+ paper", "+ output", "+ layers"]
    assert line == ["rtn", "W2A2", "50.00", "25.00", "-", "-", "75.00", "100.00"]
    assert "Top-5" not in to_markdown([make_measurement()])


def test_table_is_padded():
    lines = to_table([make_measurement(), make_measurement(Setting("pd_quant", 4, 4, 0))]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_without_the_default_the_gain_is_that_of_the_last_correction():
    header, _, line = cells(to_table([make_measurement(layers=False)]))
    assert header[-3:] == ["gain of output", "95 % interval", "p"]
    assert line[-3] == "+2.00"


def test_table_groups_seeds_that_are_not_neighbours():
    measured = [make_measurement(Setting(method, 2, 2, seed)) for seed in (0, 1) for method in ("rtn", "qdrop")]
    assert [line.split()[1] for line in to_table(measured).splitlines()[2:]] == ["rtn", "qdrop"]
    assert "mean ± standard deviation of seeds 0, 1" in title([measurement.row for measurement in measured])


def test_title_says_which_images_were_used_twice():
    row = make_measurement().row
    assert "1,024 others for the corrections" in title([row])
    assert "1,024 for the corrections, up to 9 of them the same" in title([row, replace(row, seed=1, reused_images=9)])


def test_title_says_iterations_where_something_was_learned_only():
    row = make_measurement().row
    nearest, learned = replace(row, method="rtn", iters=20_000), replace(row, method="qdrop", iters=20_000)
    assert "iterations" not in title([nearest])
    assert "20,000 iterations a unit, seed" in title([nearest, learned])


def test_title_says_why_the_published_recipe_is_not_there():
    row = make_measurement().row
    assert title([replace(row, n_cat=63)]).endswith("The published recipe takes at least 64 images.")
    assert "published recipe" not in title([replace(row, n_cat=64)])


def test_small_p_values_are_not_zero():
    assert cells(to_table([make_measurement(won=40, lost=0)]))[2][-1] == "<0.001"


def test_all_files_hold_the_same(tmp_path):
    measured = [make_measurement(), make_measurement(Setting("qdrop", 4, 4, 1), cat_paper=False)]
    parts = {"results": [each.row for each in measured], "comparisons": compare(measured)}
    parts["summary"] = summarize(measured)
    files = write_report(tmp_path, measured)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files) and not any(files.values())
    for name, lines in parts.items():
        assert (tmp_path / f"{name}.csv").read_text() == to_csv(lines)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == {name: [asdict(line) for line in lines] for name, lines in parts.items()}
    assert (tmp_path / "results.md").read_text() == to_markdown(measured) + "\n"


def test_title_says_which_weights_there_were():
    measured = [make_measurement()]
    assert "resnet8 on digits, full-precision weights: V1 of it, 16 images" in to_markdown(measured, "V1 of it")
    assert "weights" not in to_markdown(measured)
