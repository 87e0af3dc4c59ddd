"""What applying, fitting and collecting cost, timed by pytest-benchmark: `pytest benchmarks/perf`."""
