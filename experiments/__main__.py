"""The command line: ``dtr-lab COMMAND ...``, also ``python -m experiments COMMAND ...``.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> int``; it imports torch, MLflow and the like
inside ``run``, so that help answers at once. A command that brings its own parser has ``main(argv) -> int`` instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence

from lightning_modules.errors import UserInputError

PROG = "dtr-lab"
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
"""What a shell reports for a program that ended by Ctrl-C: 128 + SIGINT."""


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        module: Where it is implemented; imported only when the command is the one asked for.
        help: One line for ``dtr-lab --help``.
        own_parser: Whether ``module.main`` reads the rest of the command line itself.
    """

    module: str
    help: str
    own_parser: bool = False


COMMANDS: dict[str, Command] = {
    "demo": Command("experiments.demo", "train and compare baseline, random routing and DTR on real digits"),
    "train": Command("experiments.train", "train one model from a YAML config (LightningCLI)", own_parser=True),
    "compare": Command("experiments.compare", "compare runs: tables, figures, one HTML page, logged to MLflow"),
    "probe": Command("experiments.probe", "measure gradient conflict of a checkpoint, as precisely as one likes"),
    "affinity": Command("experiments.affinity", "measure at checkpoints what training on one interval does to others"),
    "specialists": Command("experiments.specialists", "train one model per interval, to measure negative transfer"),
    "sweep": Command("experiments.sweep", "train a grid of settings, or search for the best ones, from one file"),
    "intervals": Command("experiments.intervals", "find the timestep intervals that measured gradients suggest"),
    "sample": Command("experiments.sample", "draw images from a checkpoint"),
    "sync": Command("experiments.sync", "hand to MLflow what a run left on the local disk"),
    "ui": Command("experiments.ui", "open MLflow's user interface on the runs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0 if all went well, 2 if the user's input is at fault (the message is on stderr), 130 after
        Ctrl-C.

    Raises:
        SystemExit: After ``--help`` (code 0) and for a malformed command line (code 2), as argparse does.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserInputError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    chosen = COMMANDS.get(arguments[0]) if arguments else None
    if chosen is not None and chosen.own_parser:
        return importlib.import_module(chosen.module).main(arguments[1:])

    parser = argparse.ArgumentParser(
        prog=PROG,
        description="A workbench for studying diffusion training as multi-task learning.",
        epilog=f"`{PROG} COMMAND --help` explains a command.",
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help.capitalize() + ".")
        if command is chosen:  # the others stay unimported
            module = importlib.import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
