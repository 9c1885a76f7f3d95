"""Checkpoints of a run: list and verify."""

from __future__ import annotations

import argparse

from lm import errors
from lm.cli.command import WORKDIR, argument, command


@command(
    "checkpoints list", "step, items, bytes and state of each checkpoint of a run, without reading arrays", WORKDIR
)
def _list(args: argparse.Namespace) -> int:
    from lm.checkpoint import report

    print(report.listing(args.workdir))
    return errors.EXIT_FINISHED


@command(
    "checkpoints verify",
    "read every file of a run's checkpoints and compare its checksum",
    WORKDIR,
    argument("--step", type=int, help="of one checkpoint (default: of all)"),
)
def _verify(args: argparse.Namespace) -> int:
    from lm.checkpoint import report

    for line in report.verify(args.workdir, args.step):
        print(line, flush=True)
    return errors.EXIT_FINISHED
