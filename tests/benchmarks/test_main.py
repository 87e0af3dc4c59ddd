"""Which command runs, and with which options."""

import pytest

import benchmarks.__main__ as command_line
from benchmarks.commands import compare


@pytest.fixture
def called(monkeypatch):
    """The commands that ran, with their options."""
    seen = []

    def spy(name):
        return lambda argv: (seen.append((name, list(argv))), 7)[1]

    monkeypatch.setattr(compare, "main", spy("compare"))
    commands = {name: (spy(name), what) for name, (_, what) in command_line.COMMANDS.items()}
    monkeypatch.setattr(command_line, "COMMANDS", commands)
    return seen


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ("compare", [])),
        (["--seeds", "3"], ("compare", ["--seeds", "3"])),
        (["compare", "--seeds", "3"], ("compare", ["--seeds", "3"])),
        (["ablate", "--help"], ("ablate", ["--help"])),
        (["robustness"], ("robustness", [])),
        (["nulls", "--draws", "2"], ("nulls", ["--draws", "2"])),
        (["report", "results/a"], ("report", ["results/a"])),
        (["speed", "--steps", "9"], ("speed", ["--steps", "9"])),
    ],
)
def test_command_gets_its_options_and_gives_the_exit_code(called, argv, expected):
    assert command_line.main(argv) == 7
    assert called == [expected]


def test_unknown_command_is_refused(called, capsys):
    assert command_line.main(["compere"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no command 'compere'; choose from compare, ablate,")
    assert not called


def test_help_lists_all_commands(called, capsys):
    assert command_line.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in command_line.COMMANDS)
    assert not called


@pytest.mark.parametrize("name", [name for name in command_line.COMMANDS])
def test_every_command_has_help_under_its_name(name, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks {name} ")
