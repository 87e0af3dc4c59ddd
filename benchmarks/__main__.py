"""Command line: `python -m benchmarks COMMAND`; without a command, `compare`."""

import sys
from collections.abc import Callable, Sequence

from benchmarks.commands import ablate, compare, nulls, report, robustness, speed

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "compare": (compare.main, "quantize, attach CAT, and compare accuracy with and without it; the default"),
    "ablate": (ablate.main, "change one setting of CAT at a time: clusters, alpha, PCA dimension, images..."),
    "robustness": (robustness.main, "fit corrections on many small draws of images and show how they spread"),
    "nulls": (nulls.main, "how often a correction is accepted where nothing can be gained"),
    "report": (report.main, "make the tables of a run again from its stored predictions, without running models"),
    "speed": (speed.main, "time reconstruction against plain training steps"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 2 for input that the user can put right, 130 for an interruption."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(_usage())
        return 0
    if not argv or argv[0].startswith("-"):
        return compare.main(argv)
    if argv[0] not in COMMANDS:
        print(f"error: there is no command {argv[0]!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return COMMANDS[argv[0]][0](argv[1:])


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m benchmarks [COMMAND] [OPTIONS]",
            "",
            *lines,
            "",
            "python -m benchmarks COMMAND --help lists its options; without a command they are those of compare.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
