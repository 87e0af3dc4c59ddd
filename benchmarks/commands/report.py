"""Command line: `python -m benchmarks report` makes the tables of runs again, without running models."""

import argparse
from pathlib import Path
from types import ModuleType

from benchmarks import BenchmarkError
from benchmarks.commands import ablate, compare, nulls, robustness
from benchmarks.commands.exit_codes import command_line
from benchmarks.commands.parsers import parse_report
from benchmarks.measure.accuracy import Measurement
from benchmarks.reports import cost_report
from benchmarks.reports.comparison_plots import plot_comparison
from benchmarks.reports.comparison_report import conditions, to_markdown, write_report
from benchmarks.runs.folders import read_settings

KINDS: dict[str, ModuleType] = {module.NAME: module for module in (compare, ablate, robustness, nulls)}


def _report(args: argparse.Namespace) -> None:
    """Every figure is computed from predictions of single images; a row that says otherwise is an error."""
    compared: list[tuple[str | None, list[Measurement]]] = []
    made_by: dict[Path, tuple[str | None, ...]] = {}
    for folder in args.runs:
        settings = read_settings(folder)
        kind = settings.get("kind", compare.NAME)  # runs of earlier versions do not say
        if kind not in KINDS or "grid" not in settings:
            raise BenchmarkError(f"{folder} is no run of {', '.join(KINDS)}")
        if kind == compare.NAME:
            measured = compare.rows_of(folder).stored(settings["grid"])
            weights = compare.weights_of(settings)
            files = write_report(folder, measured, weights) | plot_comparison(folder, measured, settings.get("classes"))
            _join(compared, measured, weights)
            made_by[folder] = tuple(settings.get(digest) for digest in ("code_digest", "network_digest"))
        else:
            text, files = KINDS[kind].recompute(folder, settings)
            print(f"{text}\n")
        _print_files(folder, files)
    for weights, measured in compared:
        print("\n" + "\n\n".join(filter(None, [to_markdown(measured, weights), cost_report.to_markdown(measured)])))
    if len(compared) < len(made_by) and len(set(made_by.values())) > 1:
        print(f"\nNot all by the same code and the same definition of the network: {_groups(made_by)}.")


main = command_line("report", parse_report, _report, resumes=False)


def _join(tables: list[tuple[str | None, list[Measurement]]], measured: list[Measurement], weights: str | None) -> None:
    """Runs of one network, its weights and one protocol go into one table, unless both have measured the same."""
    for theirs, table in tables:
        ours, others = (conditions([each.row for each in group]) for group in (measured, table))
        if (weights, ours) == (theirs, others) and not {_cell(each) for each in table} & {
            _cell(each) for each in measured
        }:
            table += measured
            return
    tables.append((weights, list(measured)))


def _groups(made_by: dict[Path, tuple[str | None, ...]]) -> str:
    """The folders, those that were made by the same together."""
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for folder, digests in made_by.items():
        groups.setdefault(digests, []).append(str(folder))
    return "; ".join(", ".join(names) for names in groups.values())


def _cell(measurement: Measurement) -> tuple[str, int, int, int]:
    row = measurement.row
    return row.method, row.w_bits, row.a_bits, row.seed


def _print_files(folder: Path, files: dict[str, bool]) -> None:
    states = [f"{name} ({'the same' if same else 'written'})" for name, same in files.items()]
    print(f"{folder}: {', '.join(states)}")
