"""How a command ends: its exit code, and what it prints where it stops."""

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Sequence

from benchmarks import BenchmarkError
from benchmarks.runs.processes import this_process
from cat_plugin import CATError


def command_line(
    name: str,
    parse: Callable[[list[str]], argparse.Namespace],
    work: Callable[[argparse.Namespace], None],
    *,
    resumes: bool,
) -> Callable[[Sequence[str]], int]:
    """The `main` of a command: it takes options and gives the exit code.

    The code is 2 for input that the user can put right, 130 for an interruption. `resumes` says whether the same
    command goes on where it was stopped. `work` gets what `parse` makes of the options, and in `command` how to call
    it again.
    """

    def main(argv: Sequence[str]) -> int:
        try:
            level = logging.WARNING if this_process().first else logging.ERROR
            logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
            args = parse(list(argv))
            args.command = shlex.join(["python", "-m", "benchmarks", name, *argv])
            work(args)
        except (BenchmarkError, CATError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped; the same command resumes" if resumes else "stopped", file=sys.stderr)
            return 130
        return 0

    return main
