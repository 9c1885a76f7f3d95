"""The root config: recipes, overrides, checks across sections, and where every value came from.

A recipe is a Python file with a `config` of type `Config`. It is named by path, or by name: a file of that name in
`./configs`, then in the `configs` folder beside this package.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lm import codec
from lm.data import Data, Ramp, SentencePiece
from lm.data.ramp import Shape
from lm.errors import UserError, did_you_mean
from lm.mesh import Mesh
from lm.models import Model
from lm.models import base as models
from lm.nn import param as params
from lm.objectives import Objective
from lm.optim import Optimizer
from lm.sharding import Rules, spec_for

CONFIG_FILE = "config.json"  # in the folder of a run

Origin = Literal["default", "recipe", "command line"]


def _positive(section: str, node: Any, *names: str) -> None:
    for name in names:
        if getattr(node, name) < 1:
            raise UserError(f"{section}.{name}: expected at least 1, got {getattr(node, name)}")


def _not_negative(section: str, node: Any, *names: str) -> None:
    for name in names:
        if getattr(node, name) < 0:
            raise UserError(f"{section}.{name}: expected 0 or more, got {getattr(node, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """`microbatches` splits a batch for gradient accumulation; `precision` is that of the compute. `spike_sigmas`: a
    loss so many standard deviations above the last ones is reported with its documents (`lm.training.watch`)."""

    steps: int
    microbatches: int = 1
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    init_from: str | None = None  # folder of a run whose latest weights a new run begins with
    log_every: int = 10
    eval_every: int = 0  # steps; 0: only at the end
    spike_sigmas: float | None = 8.0

    def __post_init__(self):
        _positive("train", self, "steps", "microbatches", "log_every")
        _not_negative("train", self, "eval_every")
        if self.spike_sigmas is not None and not self.spike_sigmas > 0:
            raise UserError(f"train.spike_sigmas: expected a positive number or None, got {self.spike_sigmas}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is kept: the latest `keep_last`, every `keep_every` steps for good, and the best `keep_best` by `metric`."""

    every: int = 1000  # steps
    keep_last: int = 2
    keep_every: int = 0
    keep_best: int = 0
    metric: Literal["loss", "perplexity", "bits_per_byte"] = "loss"  # of the evaluation, lower is better

    def __post_init__(self):
        _positive("checkpoint", self, "every", "keep_last")
        _not_negative("checkpoint", self, "keep_every", "keep_best")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluation on the validation split of each source; `max_batches` 0: all of it."""

    max_batches: int = 0

    def __post_init__(self):
        _not_negative("eval", self, "max_batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. A default appears in the class of its section; a recipe says what differs."""

    model: Model
    data: Data
    objective: Objective
    optim: Optimizer
    train: Train
    mesh: Mesh = Mesh()
    rules: Rules = Rules()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A config and the origin of each of its leaf values, by dotted path."""

    config: Config
    origins: dict[str, Origin]

    def to_json(self) -> str:
        return json.dumps({"config": codec.encode(self.config), "origins": self.origins}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str) -> Resolved:
        try:
            tree = json.loads(text)
            encoded, origins = tree["config"], tree["origins"]
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise UserError(f"{where}: expected the config of a run, got something else ({e})") from e
        try:
            return cls(codec.decode(Config, encoded), origins)
        except UserError as e:
            raise UserError(f"{where}: {e}") from e


def resolve(recipe: str, overrides: Sequence[str] = ()) -> Resolved:
    """The recipe with `a.b=value` overrides applied, checked across sections and as something to train."""
    found = resolved(load(recipe), overrides)
    check_task(found.config)
    return found


def resolved(config: Config, overrides: Sequence[str] = ()) -> Resolved:
    """A config made in Python, with overrides applied, checked across sections."""
    return overridden(Resolved(config, dict(_origins(config))), overrides)


def overridden(before: Resolved, overrides: Sequence[str]) -> Resolved:
    """The same with overrides applied, checked across sections: types and values, what was there before included."""
    config = codec.override(before.config, *overrides)
    check(config)
    given = {p.removesuffix(f".{codec.TYPE}") for a in overrides for p in codec.assigned(a)}
    old, origins = codec.flatten(codec.encode(before.config)), dict(_origins(config))
    for path, value in codec.flatten(codec.encode(config)).items():
        if path.removesuffix(f".{codec.TYPE}") in given:
            origins[path] = "command line"
        elif path in before.origins and path in old and old[path] == value:
            origins[path] = before.origins[path]
    return Resolved(config, origins)


def rows_and_devices(config: Config) -> tuple[int, int | None]:
    """What the number of sequences that are computed together is a multiple of, in every batch of the run; and the
    number of devices the mesh asks for, if it does."""
    rows = math.gcd(*(shape.rows for shape in Ramp.of(config.data).shapes))
    return max(1, rows // config.train.microbatches), config.mesh.n_devices


def load(recipe: str) -> Config:
    """The `config` of a recipe file."""
    path = find_recipe(recipe)
    spec = importlib.util.spec_from_file_location(f"lm_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the annotations of classes that a recipe defines are looked up
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # whatever a recipe raises is a mistake in the recipe
        what = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
        raise UserError(f"{path}:{_line(path, e)}: {' '.join(what.split())}") from e
    if not hasattr(module, "config"):
        raise UserError(f"{path}: expected `config = Config(...)`, got no `config`")
    if not isinstance(module.config, Config):
        raise UserError(f"{path}: expected `config = Config(...)`, got {type(module.config).__name__}")
    return module.config


def _line(path: Path, e: Exception) -> int | None:
    """The line of the recipe that raised."""
    if isinstance(e, SyntaxError) and e.filename == str(path):
        return e.lineno
    lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
    return lines[-1] if lines else None


def find_recipe(recipe: str) -> Path:
    """The file a recipe's path or name stands for."""
    path = Path(recipe)
    if path.suffix == ".py":
        if not path.is_file():
            raise UserError(f"{recipe}: no such recipe file{did_you_mean(path.name, _names(path.parent))}")
        return path
    folders = [Path("configs"), Path(__file__).resolve().parent.parent / "configs"]
    for folder in folders:
        if (folder / f"{recipe}.py").is_file():
            return folder / f"{recipe}.py"
    known = {name.removesuffix(".py") for folder in folders for name in _names(folder)}
    raise UserError(f"{recipe}: no recipe of that name{did_you_mean(recipe, known)}")


def _names(folder: Path) -> list[str]:
    return [f.name for f in folder.glob("*.py")] if folder.is_dir() else []


def check(config: Config) -> None:
    """Refuses what cannot work, before a device is touched. Sections check themselves; this checks across them."""
    data, model, train = config.data, config.model, config.train
    shapes = Ramp.of(data).shapes
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
    """The objective against what the model's head predicts. An imported model with another head is a run all the same,
    which nothing here can train."""
    expected, got = config.objective.tasks, type(config.model.task)
    if got not in expected:
        raise UserError(
            f"model.task: {type(config.objective).__name__} trains {' or '.join(t.__name__ for t in expected)}, got "
            f"{got.__name__}; set model.task={expected[0].__name__}()"
        )


def ids_of_no_text(objective: Objective) -> Iterator[tuple[str, int]]:
    """(field, id) of the tokens of an objective that stand for no text, of sentinels each from the last on. What ends a
    document and what is padding are the tokenizer's own."""
    fields = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
    for name in ("mask_id", "cls_id", "sep_id", "prefix_id", "suffix_id", "middle_id", "r_id", "s_id", "x_id"):
        if name in fields:
            yield name, fields[name]
    if (first := fields.get("first_sentinel_id")) is not None:
        yield from (("first_sentinel_id", i) for i in range(first - fields["n_sentinels"] + 1, first + 1))


def _check_ids(config: Config) -> None:
    """The ids of the objective against the vocabularies of the model and of a tokenizer that is trained here. A
    tokenizer that is there already is read where its corpus is: see `lm.training.loop`."""
    model, objective, tokenizer = config.model, config.objective, config.data.tokenizer
    fields = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
    for name, value in fields.items():
        if name.endswith("_id") and value >= model.vocab_size:
            raise UserError(f"objective.{name}: expected an id below model.vocab_size {model.vocab_size}, got {value}")
    if isinstance(tokenizer, SentencePiece):
        for name, value in ids_of_no_text(objective):
            if value < tokenizer.vocab_size:
                raise UserError(
                    f"objective.{name}: expected ids that the tokenizer never makes of text, {tokenizer.vocab_size} "
                    f"and more, got {value}; data.tokenizer.vocab_size counts the tokens of text alone"
                )
        if fields.get("vocab_size", tokenizer.vocab_size) != tokenizer.vocab_size:
            raise UserError(
                f"objective.vocab_size: expected that of data.tokenizer, {tokenizer.vocab_size}, got "
                f"{fields['vocab_size']}; set them equal"
            )


def _check_parameters(config: Config) -> None:
    """The parameters against those axes of the mesh that have a size, so that it fails before any data is prepared."""
    sizes = config.mesh.sizes(config.mesh.min_devices)
    if max(sizes.values()) == 1:
        return
    model = models.abstract(config.model)
    for path, info in params.paths(model.infos).items():
        spec_for(config.rules, sizes, info.axes, info.shape, path)


def check_mesh(config: Config, n_devices: int) -> None:
    """The batch and sequence against the mesh of `n_devices`."""
    for shape in Ramp.of(config.data).shapes:
        _check_shape(config, config.mesh.sizes(n_devices), shape)


def _check_shape(config: Config, sizes: dict[str, int], shape: Shape) -> None:
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


def _where(config: Config, shape: Shape) -> str:
    """What sets the number of rows of a batch."""
    full = (shape.examples, shape.seq_len) == (config.data.batch_size, config.data.seq_len)
    return "data.batch_size" if full else f"data.ramp: batches of {shape.rows} x {shape.seq_len}"


def _origins(node: Any, at: str = "", default: bool = False) -> Iterator[tuple[str, Origin]]:
    """(path, "default" or "recipe") of every leaf of a config, by the paths of `codec.flatten`."""
    if dataclasses.is_dataclass(node):
        yield (f"{at}.{codec.TYPE}" if at else codec.TYPE), "default" if default else "recipe"
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            yield from _origins(value, f"{at}.{f.name}" if at else f.name, default or codec.is_default(f, value))
    elif isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _origins(value, f"{at}.{key}", default)
    else:
        yield at, "default" if default else "recipe"
