"""The root config: recipes, overrides, checks across sections, and where every value came from.

A recipe is a Python file with a `config` of type `Config`. It is named by path, or by name: a file of that name in
`./configs`, then in the `configs` folder beside this package.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lm import codec
from lm.data import Data, SentencePiece
from lm.errors import UserError, did_you_mean
from lm.mesh import Mesh
from lm.models import Model
from lm.objectives import Objective
from lm.optim import Optimizer
from lm.sharding import Rules

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
    """`microbatches` splits a batch for gradient accumulation; `precision` is that of the compute."""

    steps: int
    microbatches: int = 1
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    log_every: int = 10
    eval_every: int = 0  # steps; 0: only at the end

    def __post_init__(self):
        _positive("train", self, "steps", "microbatches", "log_every")
        _not_negative("train", self, "eval_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is kept: the latest `keep_last`, every `keep_every` steps for good, and the best `keep_best` by `metric`."""

    every: int = 1000  # steps
    keep_last: int = 2
    keep_every: int = 0
    keep_best: int = 0
    metric: str = "loss"  # of the evaluation, lower is better

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
    """The recipe with `a.b=value` overrides applied, checked across sections."""
    return resolved(load(recipe), overrides)


def resolved(config: Config, overrides: Sequence[str] = ()) -> Resolved:
    """A config made in Python, with overrides applied, checked across sections."""
    for assignment in overrides:
        config = codec.override(config, assignment)
    check(config)
    encoded = codec.encode(config)
    set_paths = [a.partition("=")[0] for a in overrides]
    origins: dict[str, Origin] = {}
    for path in codec.flatten(encoded):
        if any(path == p or path.startswith(p + ".") for p in set_paths):
            origins[path] = "command line"
        else:
            origins[path] = "default" if _is_default(config, path) else "recipe"
    return Resolved(config, origins)


def load(recipe: str) -> Config:
    """The `config` of a recipe file."""
    path = find_recipe(recipe)
    spec = importlib.util.spec_from_file_location(f"lm_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: cannot be loaded as Python; a recipe is a .py file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    except (SyntaxError, TypeError, NameError, ImportError, AttributeError) as e:
        raise UserError(f"{path}: {type(e).__name__}: {e}") from e
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise UserError(f"{path}: expected `config = Config(...)`, got {type(config).__name__}")
    return config


def find_recipe(recipe: str) -> Path:
    """The file a recipe's path or name stands for."""
    path = Path(recipe)
    if path.suffix == ".py" or path.exists():
        if not path.is_file():
            raise UserError(f"{recipe}: no such recipe file")
        return path
    folders = [Path("configs"), Path(__file__).resolve().parent.parent / "configs"]
    for folder in folders:
        if (folder / f"{recipe}.py").is_file():
            return folder / f"{recipe}.py"
    known = {f.stem for folder in folders if folder.is_dir() for f in folder.glob("*.py")}
    raise UserError(f"{recipe}: no recipe of that name{did_you_mean(recipe, known)}")


def check(config: Config) -> None:
    """Refuses what cannot work, before a device is touched. Sections check themselves; this checks across them."""
    data, model, train = config.data, config.model, config.train
    if data.batch_size % train.microbatches:
        raise UserError(
            f"train.microbatches: {train.microbatches} does not divide data.batch_size {data.batch_size}"
        )
    if model.max_seq_len is not None and data.seq_len > model.max_seq_len:
        raise UserError(
            f"data.seq_len: {data.seq_len} is beyond the position table of {model.max_seq_len}; "
            f"raise model.max_positions or shorten data.seq_len"
        )
    if isinstance(data.tokenizer, SentencePiece) and data.tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"model.vocab_size: {model.vocab_size} is smaller than data.tokenizer.vocab_size "
            f"{data.tokenizer.vocab_size}; set them equal"
        )
    config.objective.check(data.seq_len)
    fixed = config.mesh.n_devices
    if fixed is not None:
        check_mesh(config, fixed)


def check_mesh(config: Config, n_devices: int) -> None:
    """The batch and sequence against the mesh of `n_devices`."""
    sizes = config.mesh.sizes(n_devices)
    shards = 1
    for axis in config.rules.spec(("act_batch",)):
        for a in (axis,) if isinstance(axis, str) else axis or ():
            shards *= sizes[a]
    rows = config.data.batch_size // config.train.microbatches
    if rows % shards:
        micro = f" / train.microbatches {config.train.microbatches}" if config.train.microbatches > 1 else ""
        raise UserError(
            f"data.batch_size: {config.data.batch_size}{micro} is not divisible by the {shards} data shards of the "
            f"mesh (data x fsdp x expert); set a multiple of {shards * config.train.microbatches}"
        )
    if config.data.seq_len % sizes["seq"]:
        raise UserError(f"data.seq_len: {config.data.seq_len} is not divisible by mesh.seq {sizes['seq']}")


def _is_default(config: Config, path: str) -> bool:
    node: Any = config
    *parents, last = path.split(".")
    for key in parents:
        node = node[key] if isinstance(node, dict) else getattr(node, key)
    if isinstance(node, dict):
        return False
    if last == codec.TYPE:
        return _is_default(config, ".".join(parents)) if parents else True
    for f in dataclasses.fields(node):
        if f.name == last:
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            return default is not dataclasses.MISSING and default == getattr(node, last)
    return False
