"""Checks across the sections of a config. A section checks itself."""

from __future__ import annotations

import math

from lm.config.sections import Config
from lm.data import BatchSchedule, SentencePiece
from lm.data.stream.batches import BatchShape
from lm.errors import UserError
from lm.models import base as models
from lm.nn import param as params
from lm.sharding import spec_for


def rows_and_devices(config: Config) -> tuple[int, int | None]:
    """Returns a number that divides the sequences that are computed together, in every batch of the run; and the
    number of devices the mesh asks for, if it does."""
    rows = math.gcd(*(shape.rows for shape in BatchSchedule.of(config.data).shapes))
    return max(1, rows // config.train.microbatches), config.mesh.n_devices


def check(config: Config) -> None:
    """Refuses what cannot work, before a device is touched. Sections check themselves; this checks across them."""
    data, model, train = config.data, config.model, config.train
    shapes = BatchSchedule.of(data).shapes
    for shape in shapes:
        if shape.rows % train.microbatches:
            where = _where(config, shape)
            rows = f"{where} {shape.rows}" if where == "data.batch_size" else f"the {shape.rows} rows of {where}"
            raise UserError(f"train.microbatches: {train.microbatches} does not divide {rows}; set a divisor of it")
    if config.objective.family != model.family:
        raise UserError(
            f"objective: {type(config.objective).__name__} is for models of the family {config.objective.family}, got "
            f"{type(model).__name__}, which is of {model.family}; take an objective of that family"
        )
    _check_ids(config)
    for shape in shapes:
        try:
            config.objective.check(shape.seq_len)
        except UserError as e:
            raise e if shape.seq_len == data.seq_len else UserError(f"data.ramp: {e}") from e
    longest = config.objective.longest(data.seq_len)
    if model.max_seq_len is not None and longest > model.max_seq_len:
        rows = f" (rows of {longest} for {type(config.objective).__name__})" if longest != data.seq_len else ""
        raise UserError(
            f"data.seq_len: {data.seq_len}{rows} is beyond the position table of {model.max_seq_len}; "
            f"raise model.max_positions or shorten data.seq_len"
        )
    if isinstance(data.tokenizer, SentencePiece) and data.tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"model.vocab_size: {model.vocab_size} is smaller than data.tokenizer.vocab_size "
            f"{data.tokenizer.vocab_size}; set them equal"
        )
    if config.checkpoint.metric == "bits_per_byte" and config.objective.unit != "token":
        raise UserError(
            f"checkpoint.metric: {type(config.objective).__name__} has no bits_per_byte, as its loss is per "
            f"{config.objective.unit}; set checkpoint.metric=loss"
        )
    every, eval_every = config.checkpoint.every, train.eval_every
    if config.checkpoint.keep_best and (not eval_every or every % eval_every):
        raise UserError(
            f"checkpoint.keep_best: a checkpoint has a metric only where it is evaluated, expected train.eval_every to "
            f"divide checkpoint.every {every}, got {eval_every}; set train.eval_every={every}"
        )
    config.optim.schedule.make(config.optim.lr, train.steps)  # raises where the run is too short for it
    check_mesh(config, config.mesh.min_devices)  # what fails on the smallest mesh fails on all
    _check_parameters(config)


def check_task(config: Config) -> None:
    """Checks the objective against what the model's head predicts. An imported model with another head is a run all
    the same, which nothing here can train."""
    expected, got = config.objective.tasks, type(config.model.task)
    if got not in expected:
        raise UserError(
            f"model.task: {type(config.objective).__name__} trains {' or '.join(t.__name__ for t in expected)}, got "
            f"{got.__name__}; set model.task={expected[0].__name__}()"
        )


def _check_ids(config: Config) -> None:
    """Checks the ids of the objective against the vocabularies of the model and of a tokenizer that is trained here.
    A tokenizer that is there already is read where its corpus is: see `lm.training.start`."""
    model, objective, tokenizer = config.model, config.objective, config.data.tokenizer
    tokens = objective.special_tokens()
    for token in tokens:
        if (most := token.ids[-1]) >= model.vocab_size:
            raise UserError(
                f"objective.{token.name}: expected an id below model.vocab_size {model.vocab_size}, got {most}"
            )
    if isinstance(tokenizer, SentencePiece):
        for token in tokens:
            if token.kind == "no_text" and token.ids[0] < tokenizer.vocab_size:
                raise UserError(
                    f"objective.{token.name}: expected ids that the tokenizer never makes of text, "
                    f"{tokenizer.vocab_size} and more, got {token.ids[0]}; data.tokenizer.vocab_size counts the tokens "
                    "of text alone"
                )
        if (n := getattr(objective, "vocab_size", tokenizer.vocab_size)) != tokenizer.vocab_size:
            raise UserError(
                f"objective.vocab_size: expected that of data.tokenizer, {tokenizer.vocab_size}, got {n}; set them "
                "equal"
            )


def _check_parameters(config: Config) -> None:
    """Checks the parameters against the axes of the mesh that have a size: it fails before any data is prepared."""
    sizes = config.mesh.sizes(config.mesh.min_devices)
    if max(sizes.values()) == 1:  # nothing is divided: no need to trace the model
        return
    model = models.abstract(config.model)
    for path, info in params.paths(model.infos).items():
        spec_for(config.rules, sizes, info.axes, info.shape, path)


def check_mesh(config: Config, n_devices: int) -> None:
    """Checks the batch and sequence against the mesh of `n_devices`."""
    for shape in BatchSchedule.of(config.data).shapes:
        _check_shape(config, config.mesh.sizes(n_devices), shape)


def _check_shape(config: Config, sizes: dict[str, int], shape: BatchShape) -> None:
    placement = config.rules.act_batch or ()
    axes = (placement,) if isinstance(placement, str) else placement
    shards = math.prod(sizes[a] for a in axes)
    if shape.rows // config.train.microbatches % shards:
        micro = f" / train.microbatches {config.train.microbatches}" if config.train.microbatches > 1 else ""
        raise UserError(
            f"{_where(config, shape)}: {shape.rows}{micro} is not divisible by the {shards} data shards of the "
            f"mesh ({' x '.join(f'{a}={sizes[a]}' for a in axes)}); "
            f"set a multiple of {shards * config.train.microbatches}"
        )
    row = config.objective.row(shape.seq_len)
    for length in (row.length, row.memory):
        if length % sizes["seq"]:
            where = "data.seq_len" if shape.seq_len == config.data.seq_len else "data.ramp: seq_len"
            made = f" (rows of {length})" if length != shape.seq_len else ""
            raise UserError(
                f"{where}: {shape.seq_len}{made} is not divisible by mesh.seq {sizes['seq']}; "
                f"set a multiple of it or a smaller mesh.seq"
            )


def _where(config: Config, shape: BatchShape) -> str:
    """What sets the number of rows of a batch."""
    full = (shape.examples, shape.seq_len) == (config.data.batch_size, config.data.seq_len)
    return "data.batch_size" if full else f"data.ramp: batches of {shape.rows} x {shape.seq_len}"
