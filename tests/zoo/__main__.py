"""`python -m tests.zoo [FAMILY ...]`: examines all families, or those named, in two processes, and prints the table."""

import argparse
import logging
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from .examine import Row, examine, table
from .families import FAMILIES


def row_of(family: str) -> Row:
    """The row of one family, quietly: the table says what is left."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    one = FAMILIES[family]
    return examine(family, one.name, one.size, one.build)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all by default")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("results/zoo"), help="folder of table.md")
    args = parser.parse_args()
    unknown = sorted(set(args.families) - set(FAMILIES))
    if unknown:
        parser.error(f"unknown families {unknown}; there are {', '.join(FAMILIES)}")
    names = args.families or list(FAMILIES)
    rows: dict[str, Row] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context, max_tasks_per_child=8) as pool:
        for future in as_completed([pool.submit(row_of, name) for name in names]):
            row = future.result()
            rows[row.family] = row
            print(
                f"{len(rows)}/{len(names)} {row.family}: {row.failure or 'done'}, {row.seconds:.0f} s", file=sys.stderr
            )
    lines = list(table([rows[name] for name in names]))
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
