"""The `lm` command. The only place that parses arguments, prints errors without a traceback, and sets exit codes.

A command is a function below `@command(...)` in one of the modules here. It imports what it needs when it runs:
`describe` and `generate` start without TensorFlow.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from lm import errors
from lm.cli import data, folders, runs
from lm.cli.command import Command

# In the order of the help.
COMMANDS = [c for module in (runs, data, folders) for c in vars(module).values() if isinstance(c, Command)]
GROUPS = {"data": "look at data: the rows of a step, where they are from, documents and tokens, damaged files"}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    code = _run(args)
    sys.stdout.flush()
    sys.stderr.flush()
    if args.command == "train" and code != errors.EXIT_FINISHED:
        os._exit(code)  # no exit handlers: in a group of processes they wait for peers that may be gone
    sys.exit(code)


def _run(args: argparse.Namespace) -> int:
    try:
        return args.run_command(args)
    except errors.UserError as e:
        print(f"lm {args.command}: error: {e}", file=sys.stderr)
        if args.traceback:
            traceback.print_exc()
        return errors.EXIT_USER
    except KeyboardInterrupt:
        print(f"lm {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return errors.EXIT_FAILED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(errors.EXIT_USER, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser, commands = _parsers()
    for n in (1, 2):  # words of a command's name
        if (name := " ".join(argv[:n])) in commands:  # intermixed: overrides may stand before, between, after options
            return commands[name].parse_intermixed_args(argv[n:])
    return parser.parse_args(argv)


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Returns the parser of all commands, and the parser of each one."""
    parser = _Parser(prog="lm", description="Pretrain, evaluate and sample Transformer language models in JAX.")
    groups = {"": parser.add_subparsers(dest="command", required=True, metavar="COMMAND")}
    commands: dict[str, argparse.ArgumentParser] = {}
    for name, help, arguments, run in COMMANDS:
        group, _, choice = name.rpartition(" ")
        if group not in groups:
            within = groups[""].add_parser(group, help=GROUPS[group], description=GROUPS[group])
            groups[group] = within.add_subparsers(dest="command", required=True, metavar="COMMAND")
        p = commands[name] = groups[group].add_parser(choice, help=help, description=help)
        p.add_argument("--traceback", action="store_true", help="show where an error came from")
        p.set_defaults(run_command=run, command=name)
        for names, settings in arguments:
            p.add_argument(*names, **settings)
    return parser, commands
