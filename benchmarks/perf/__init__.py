"""What a correction costs, timed by pytest-benchmark: `pytest benchmarks/perf`."""
