"""The command line and the measurements behind it: `python -m benchmarks`."""


class BenchmarkError(ValueError):
    """Something about the input that the user can put right; the message says what, and what was expected."""
