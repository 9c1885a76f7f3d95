"""The `lm` command. The only place that parses arguments, prints errors without a traceback, and sets exit codes.

A command is a function below `@command(...)` in one of the modules here. It imports what it needs when it runs:
`describe` and `generate` start without TensorFlow.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from lm import errors
from lm.cli import checkpoints, data, folders, runs, surroundings
from lm.cli.command import Command

# In the order of the help.
COMMANDS = [c for module in (runs, checkpoints, data, folders) for c in vars(module).values() if isinstance(c, Command)]
GROUPS = {
    "checkpoints": "look at the checkpoints of a run: which there are, and whether they are whole",
    "data": "look at data: the rows of a step, where they are from, documents and tokens, damaged files",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits."""
    surroundings.show_any_text()
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    code = _run(args)
    surroundings.leave_pipe()
    if args.command == "train" and code != errors.EXIT_FINISHED:
        os._exit(code)  # no exit handlers: in a group of processes they wait for peers that may be gone
    sys.exit(code)


def _run(args: argparse.Namespace) -> int:
    def refuse(line: str, code: int = errors.EXIT_USER) -> int:
        with contextlib.suppress(OSError):  # nobody reads that either: the exit code says it
            print(f"lm {args.command}: {line}", file=sys.stderr)
            if args.traceback:
                traceback.print_exc()
        return code

    try:
        code = args.run_command(args)
        sys.stdout.flush()
        return code
    except errors.UserError as e:
        return refuse(f"error: {e}")
    except OSError as e:
        if isinstance(e, BrokenPipeError) and surroundings.is_unread():
            return errors.EXIT_PIPE
        line = f"error: {errors.UserError(surroundings.explain(e))}"
        return refuse(line, errors.EXIT_INFRASTRUCTURE if surroundings.may_pass(e) else errors.EXIT_USER)
    except surroundings.StoppedError:
        return refuse("stopped outside of the steps: nothing new to save; run it again", errors.EXIT_PREEMPTED)
    except KeyboardInterrupt:
        return refuse("interrupted", 130)
    except Exception:
        traceback.print_exc()
        return errors.EXIT_FAILED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if "unrecognized arguments: -" in message:
            message += "; a text that begins with - goes after --"
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
