"""What a run begins with: its corpus, its state, and whether they belong together. All of it reads and refuses; what a
run writes of itself comes after."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from lm import distributed
from lm.checkpoint import Checkpoints, Meta
from lm.checkpoint.integrity import Damage
from lm.checkpoint.manager import Whole
from lm.config import Config
from lm.config.resolve import stored_tree
from lm.data import NO_PAD, BatchSchedule, Corpus, Stream, Tokenizer, prepare
from lm.data.tokenizer.open import exists, open_tokenizer
from lm.data.tokenizer.slow import from_bytes
from lm.errors import UserError
from lm.files import is_remote
from lm.training.setup import Setup
from lm.training.state import Position, State
from lm.workdir import Workdir

WAY_OUT = "set model to what it was made with"  # of weights that do not fit


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: at the newest checkpoint of its folder that is whole, or else at nothing, with or without
    other weights.

    meta: of that checkpoint; None: the run is new. stored: the checkpoints; damaged: what is wrong with those that are
    not whole. `find` refuses and writes nothing, so that whatever a run then writes is of a run that goes on.
    """

    folder: Workdir
    position: Position
    meta: Meta | None
    stored: Checkpoints | None
    damaged: dict[int, Damage]

    @classmethod
    def find(cls, folder: Workdir, setup: Setup, stream: Stream) -> Start:
        """Compares what is in `folder` with what the config makes: the order of the data and the trees of arrays.
        Raises UserError where they differ, where no checkpoint is whole, and where the data ends before the run."""
        config, position, meta, found = setup.config, Position(), None, Whole(None, {})
        stored = Checkpoints(folder) if folder.has_checkpoints() else None
        if stored is not None:

            def compare(step: int) -> None:
                meta = stored.meta(step)
                stream.check(meta.data, meta.examples_seen)
                stored.check(step, setup.abstract_state)

            found = stored.newest_whole(compare)
            if found.step is not None:
                meta = stored.meta(found.step)
                position = Position(found.step, meta.examples_seen)
            elif found.damaged:
                step, what = next(iter(found.damaged.items()))
                raise UserError(
                    f"{folder}: expected a checkpoint that is whole, got none: {step}/{what}; move "
                    f"{stored.folder} away to begin anew, or bring the files back"
                )
        if meta is None:
            _check_weights(config, setup)
        stream.check_epochs(**position._asdict(), steps=config.train.steps, ramp=BatchSchedule.of(config.data))
        return cls(folder, position, meta, stored, found.damaged)

    def state(self, setup: Setup) -> State:
        """The state at `position`, on the devices of `setup`."""
        if self.meta is None or self.stored is None:
            return initial_state(setup.config, setup)
        return self.stored.restore(self.position.step, setup.abstract_state)

    def set_aside(self) -> list[str]:
        """Renames the folders of the steps that are not whole, which the run will come to again; says so."""
        lines = []
        for step, what in sorted(self.damaged.items()):
            assert self.stored is not None
            lines.append(f"checkpoint of step {step} is damaged: {what}; set aside as {self.stored.set_aside(step)}")
        return lines


def initial_state(config: Config, setup: Setup) -> State:
    """Makes a fresh state, or one with the weights of another run and nothing else of it."""
    folder = config.train.init_from
    state = setup.init()
    if folder is None:
        return state
    state = state._replace(params=None)  # before there are others: they may fill half of the device
    with _weights(config) as (source, step):
        params = source.restore_params(step, setup.abstract_state.params, WAY_OUT)
    # A copy: the step is given both to consume.
    return state._replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))


def _check_weights(config: Config, setup: Setup) -> None:
    """Checks the weights that a new run begins with against its model, before a device holds any."""
    if config.train.init_from is not None:
        with _weights(config) as (source, step):
            source.check_params(step, setup.abstract_state.params, WAY_OUT)


@contextlib.contextmanager
def _weights(config: Config) -> Iterator[tuple[Checkpoints, int]]:
    """The checkpoint of `train.init_from`, which an error within names."""
    assert config.train.init_from is not None
    source = Checkpoints(config.train.init_from)
    step = source.latest()
    assert step is not None  # `tokenizer_of_weights` saw it
    with _of_weights():
        yield source, step


@contextlib.contextmanager
def _of_weights() -> Iterator[None]:
    """Names the setting in an error within."""
    try:
        yield
    except UserError as e:
        raise UserError(f"train.init_from: {e}") from e


def open_data(config: Config, folder: Workdir) -> Corpus:
    """The corpus of a run, prepared where it is not yet, and compared with the model, the objective and the weights
    that the run in `folder` begins with. Raises UserError; before the corpus is made where that can be known."""
    of_weights = tokenizer_of_weights(config, folder)  # these two first: a corpus may take hours
    check_named_tokenizer(config)
    corpus = prepare_once(config)
    check_tokenizer(config, corpus.tokenizer)
    check_same_ids(config, of_weights, corpus.tokenizer)
    return corpus


def prepare_once(config: Config) -> Corpus:
    """The corpus, tokenised by the first process while the others wait; or copied from afar by every host."""
    first = distributed.is_main() or is_remote(config.data.path)
    if first:
        corpus = prepare(config.data)
    distributed.barrier("prepare")
    return corpus if first else prepare(config.data)  # opens what the first has made


def check_workdir(workdir: Workdir) -> None:
    """Refuses an imported model: it has no optimizer state to go on from; and the folder of another program, whose
    config.json a run would write over."""
    if workdir.is_imported():
        raise UserError(
            f"{workdir}: expected a new folder or a run to resume, got an imported model; take another --workdir and "
            f"start from it with train.init_from={workdir}"
        )
    if not workdir.has_checkpoints() and (stored := workdir.read_config()) is not None:
        stored_tree(stored, str(workdir.config))


def tokenizer_of_weights(config: Config, workdir: Workdir) -> Tokenizer | None:
    """The tokenizer of the weights a new run begins with; None where it begins with none, goes on and needs them no
    more, or they came without. UserError where the weights are not there, before a corpus is made."""
    folder = config.train.init_from
    if folder is None or (workdir.has_checkpoints() and Checkpoints(workdir).latest() is not None):
        return None
    if not Workdir.of(folder, "train.init_from").has_checkpoints():
        raise UserError(
            f"train.init_from: {folder}: expected the folder of a run, got no checkpoints there; name a --workdir that "
            "was trained, or one of `lm import-hf`"
        )
    source = Checkpoints(folder)
    step = source.latest()
    if step is None:
        raise UserError(f"train.init_from: {folder}: no finished checkpoint there yet")
    with _of_weights():
        stored = source.meta(step).tokenizer
    return from_bytes(stored, f"{folder}: tokenizer", literal=True) if stored else None


def check_same_ids(config: Config, of_weights: Tokenizer | None, tokenizer: Tokenizer) -> None:
    """Refuses a corpus of another tokenizer: its ids stand for other text than the weights learnt, and fit all the
    same."""
    if of_weights is not None and tokenizer.fingerprint != of_weights.fingerprint:
        folder = config.train.init_from
        raise UserError(
            f"train.init_from: {folder}: expected a corpus of its tokenizer {of_weights.fingerprint[:12]}, got one of "
            f"{tokenizer.fingerprint[:12]} in {config.data.path}; set data.tokenizer={folder} and data.path to a new "
            "folder"
        )


def check_named_tokenizer(config: Config) -> None:
    """Checks the tokenizer that the config names, before a corpus is made with it."""
    name = config.data.tokenizer
    if isinstance(name, str) and exists(name):
        check_tokenizer(config, open_tokenizer(name))


def check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """Checks the tokenizer against the model and the objective."""
    objective = config.objective
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            f"set at least that"
        )
    tokens, own = objective.special_tokens(), {"start_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    for name, got in ((token.name, token.ids[0]) for token in tokens if token.kind == "tokenizer"):
        if got != (expected := own[name]):
            none = name == "pad_id" and expected == NO_PAD
            why = f"{expected}, as it has no padding" if none else f"{expected}"
            or_else = ", or name a pad_token in its tokenizer_config.json" if none else ""
            raise UserError(f"objective.{name}: the tokenizer says {why}, got {got}; set it to {expected}{or_else}")
    size = tokenizer.token_bytes()
    for name, value in ((token.name, i) for token in tokens if token.kind == "no_text" for i in token.ids):
        if 0 <= value < len(size) and size[value]:
            raise UserError(
                f"objective.{name}: expected an id that the tokenizer never makes of text, got {value}, which is "
                f"{tokenizer.pieces([value])[0]!r}; take one of its special tokens, make one of them special in its "
                f"tokenizer_config.json, or take an id from {len(size)} on"
            )
