"""Data: prepare, and what looks at it."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from lm import errors
from lm.cli.command import BATCH, CORPUS, CORPUS_OVERRIDES, OVERRIDES, RECIPE, WORKDIR, argument, command

if TYPE_CHECKING:
    from lm.data import Store


@command(
    "prepare",
    "train the tokenizer and tokenise the corpus of a recipe",
    RECIPE,
    OVERRIDES,
    argument("--force", action="store_true", help="throw away what is there and begin anew"),
    argument("--host", type=int, metavar="I", help="number of this host, from 0, of several that share data.path"),
    argument("--hosts", type=int, metavar="N", help="how many they are; start the command on each"),
)
def _prepare(args: argparse.Namespace) -> int:
    from lm import config
    from lm.data import prepare

    if (args.host is None) != (args.hosts is None):
        raise errors.UserError(
            "--host I --hosts N: expected both or none, got one; each host needs a number of its own"
        )
    data = config.resolve(args.recipe, args.overrides).config.data
    prepare(data, force=args.force, host=args.host or 0, hosts=1 if args.hosts is None else args.hosts)
    return errors.EXIT_FINISHED


@command(
    "data preview",
    "rows of a step as the objective makes them, as text",
    RECIPE,
    OVERRIDES,
    argument("--step", type=int, required=True, help=BATCH),
    argument("--rows", type=int, default=4, help="how many of the batch (default: %(default)s)"),
)
def _data_preview(args: argparse.Namespace) -> int:
    from lm import config
    from lm.data import BatchSchedule, Stream, open_corpus
    from lm.data.inspect.preview import preview

    resolved = config.resolve(args.recipe, args.overrides).config
    data, corpus = resolved.data, open_corpus(resolved.data)
    stream = Stream.of(data, corpus)
    ramp = BatchSchedule.of(data)
    print(preview(stream, corpus.tokenizer, resolved.objective, step=args.step, ramp=ramp, rows=args.rows))
    return errors.EXIT_FINISHED


@command(
    "data where",
    "source, epoch, row, documents and tokens of the rows of a run",
    WORKDIR,
    argument("--step", type=int, required=True, help=BATCH),
    argument("--rows", type=int, help="how many of the batch (default: all)"),
)
def _data_where(args: argparse.Namespace) -> int:
    from lm import run
    from lm.data import BatchSchedule, Stream, open_corpus
    from lm.data.inspect import provenance

    at = run.data_position(args.workdir, args.step)
    data = at.config.data
    stream = Stream.of(data, open_corpus(data))
    for meta in at.metas:
        stream.check(meta.data, meta.examples_seen)
    first, shape = at.examples_seen, BatchSchedule.of(data).shape(at.examples_seen)
    print(provenance.where(stream, step=args.step, first=first, shape=shape, rows=args.rows, exclude=data.exclude))
    return errors.EXIT_FINISHED


@command(
    "data stats",
    "documents, tokens, bytes per token and lengths of a corpus",
    CORPUS,
    CORPUS_OVERRIDES,
    argument("--png", metavar="FILE", help="also draw the lengths: documents, and their share of the tokens"),
)
def _data_stats(args: argparse.Namespace) -> int:
    from lm.data.inspect import histogram, stats

    stores = _stores(args)
    if args.png:
        histogram.write_png(stores, args.png)
    print(stats.stats(stores))
    return errors.EXIT_FINISHED


@command("data verify", "read every shard of a corpus and compare its checksum", CORPUS, CORPUS_OVERRIDES)
def _data_verify(args: argparse.Namespace) -> int:
    from lm.data.inspect import stats

    for line in stats.verify(_stores(args)):
        print(line, flush=True)
    return errors.EXIT_FINISHED


def _stores(args: argparse.Namespace) -> dict[str, Store]:
    """Finds the stores of a folder as they are, or those that a recipe names, which must be made with its settings."""
    from lm.data import open_corpus
    from lm.data.inspect import stats
    from lm.files import is_remote

    if os.path.isdir(args.target) or is_remote(args.target):
        if args.overrides:
            raise errors.UserError(
                f"{args.target}: expected no overrides with a folder, got {args.overrides[0]!r}; name a recipe for them"
            )
        return stats.find_stores(args.target)
    from lm import config

    return stats.stores_of(open_corpus(config.resolve(args.target, args.overrides).config.data))
