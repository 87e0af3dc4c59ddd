"""`python -m tests.zoo [FAMILY ...]`: examines all families, or those named, and prints the table."""

import argparse
import logging
import multiprocessing
import sys
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from .examine import Row, examine, table
from .families import FAMILIES, LEFT


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
    args.results.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Row] = {}
    text = ""
    for row in examined(names, args.processes):
        rows[row.family] = row
        print(f"{len(rows)}/{len(names)} {row.family}: {row.failure or 'done'}, {row.seconds:.0f} s", file=sys.stderr)
        text = "\n".join(table([rows[name] for name in sorted(rows)])) + "\n"
        (args.results / "table.md").write_text(text, "utf-8")
    print(text, end="")


def examined(names: list[str], processes: int) -> Iterator[Row]:
    """Rows as they are finished; each family has a process of its own, so that one that dies is but a row."""
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(name, sender))
            process.start()
            sender.close()
            running[receiver] = name, process
        for receiver in wait(list(running)):
            name, process = running.pop(receiver)
            try:
                row = receiver.recv()
            except EOFError:
                one = FAMILIES[name]
                row = Row(family=name, name=one.name, size=one.size, failure="its process died (out of memory?)")
            process.join()
            yield row


def _send(family: str, sender: Connection) -> None:
    """Examines quietly: the table says what is left."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    one = FAMILIES[family]
    row = examine(family, one.name, one.size, one.build)
    row.reason = LEFT.get(family, "")
    sender.send(row)


if __name__ == "__main__":
    main()
