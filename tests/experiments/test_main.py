"""The command line as such: what it imports, how it hands over, how it fails."""

import importlib
import re
import subprocess
import sys
import types

import pytest

from experiments import __main__ as cli
from lightning_modules.errors import UserInputError

HEAVY = ("torch", "mlflow", "pytorch_lightning", "matplotlib", "scipy", "pandas", "xarray", "sklearn")


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "experiments", *arguments], capture_output=True, text=True, timeout=60)


def modules_loaded_by(*arguments: str) -> set[str]:
    code = (
        "import sys\n"
        "from experiments.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: dtr-lab" in done.stdout
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS if name != "train")])
def test_help_imports_nothing_heavy(arguments):
    assert not modules_loaded_by(*arguments).intersection(HEAVY)


def test_help_lists_every_command():
    listed = run_cli("--help").stdout
    for name, command in cli.COMMANDS.items():
        assert re.search(rf"\n    {name}\s", listed)  # a long name has a line of its own
        assert command.help.split()[0] in listed


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_module(name):
    assert importlib.util.find_spec(cli.COMMANDS[name].module) is not None


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["ui", "--nonsense"], ["ui", "--port", "0"]])
def test_a_malformed_command_line_ends_with_code_2(arguments):
    done = run_cli(*arguments)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def command(monkeypatch):
    """A command ``probe`` whose module a test fills in."""
    module = types.ModuleType("probe_command")
    module.add_arguments = lambda parser: parser.add_argument("--number", type=int)
    monkeypatch.setitem(sys.modules, "probe_command", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("probe_command", "probe"))
    return module


def test_arguments_and_exit_code_pass_through(command):
    command.run = lambda args: args.number + 1
    assert cli.main(["probe", "--number", "6"]) == 7


def test_a_command_with_its_own_parser_gets_the_rest_untouched(command, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("probe_command", "probe", own_parser=True))
    command.main = lambda argv: len(argv)
    assert cli.main(["probe", "--trainer.max_steps=3", "--help"]) == 2


def test_the_users_mistake_is_one_line_without_traceback(command, capsys):
    def run(args):
        raise UserInputError("beta is 2, but must be in (0, 1]")

    command.run = run
    assert cli.main(["probe"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "dtr-lab: error: beta is 2, but must be in (0, 1]\n"
    assert captured.out == ""


def test_our_own_mistake_keeps_its_traceback(command):
    def run(args):
        raise ValueError("a bug")

    command.run = run
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["probe"])


def test_interrupt_ends_with_130(command, capsys):
    def run(args):
        raise KeyboardInterrupt

    command.run = run
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "dtr-lab: interrupted\n"
