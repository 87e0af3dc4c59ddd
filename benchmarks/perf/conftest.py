"""Puts the figures of the bars under the table of timings."""


def pytest_terminal_summary(terminalreporter):
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == "figures" and report.when == "call":
                    terminalreporter.write_line(value)
