"""The library face of a finished or running run: `restore(workdir)` and what can be done with it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from etils import epath

from lm import config as configs
from lm.checkpoint import Checkpoints, Meta
from lm.checkpoint.imported import ImportRecord
from lm.config import Config, Resolved
from lm.data import BatchSchedule
from lm.data.stream.batches import MAX_STEP
from lm.data.tokenizer.huggingface import HFTokenizer
from lm.data.tokenizer.slow import from_bytes
from lm.errors import UserError
from lm.mesh import Mesh, make_mesh
from lm.models import LanguageModeling
from lm.training.setup import Setup, compute_dtype
from lm.workdir import Workdir

if TYPE_CHECKING:
    from lm.generation import Generator
    from lm.generation.processors import Search


@dataclasses.dataclass(frozen=True)
class Run:
    """The weights of one step (their moving average where one is kept) and all that belongs to them."""

    resolved: Resolved
    step: int
    setup: Setup
    params: dict
    tokenizer: Any  # lm.data.Tokenizer, which of an imported model is not literal; None: its folder had none
    imported: epath.Path | None = None  # what an import keeps of its folder

    @property
    def config(self) -> Config:
        return self.resolved.config

    def check_trained(self, what: str) -> None:
        """Raises UserError for `what` where a part of the model is as it was made: that of an imported body."""
        if self.imported is not None:
            ImportRecord.read(self.imported).check_trained(what, self.imported.parent)

    def generator(self) -> Generator:
        """Writes text with this run's model, by the special ids of its objective or of the folder it came from."""
        from lm.generation import Generator

        model, objective = self.config.model, self.config.objective
        if model.family == "encoder" or not isinstance(model.task, LanguageModeling):
            kind = f"{type(model).__name__} for {type(model.task).__name__}"
            raise UserError(
                f"generate: expected a decoder or an encoder-decoder of words, got {kind}; it writes no text"
            )
        self.check_trained("generate")
        if self.tokenizer is None:
            raise UserError("generate: the imported folder had no tokenizer; import it again with one")
        make = functools.partial(
            Generator, model, self.params, dtype=compute_dtype(self.config.train.precision, self.setup.mesh)
        )
        reads = model.family == "encoder_decoder"
        if self.imported is not None:
            search, start = _says(self.imported, self.config, self.tokenizer)
            ends = search.eos_token_id
            start_id = start if reads else None
            # An id that ends a text is drawn whatever the padding is.
            return make(_Imported(self.tokenizer), start_id=start_id, pad_id=ends[0], end_id=ends, search=search)
        end = objective.start_id
        return make(
            _Source(self.tokenizer, end) if reads else self.tokenizer,
            start_id=objective.decoder_start_id if reads else end,
            pad_id=objective.pad_id if objective.pad_id >= 0 else end,
            end_id=end,
        )


def _says(folder: epath.Path, config: Config, tokenizer: HFTokenizer) -> tuple[Search, int]:
    """What the files of an imported model say: how it searches and what ends a text, and what a decoder over an encoder
    reads first. A text ends at whatever a file or the tokenizer calls an end; ids that none of them names are those of
    the objective, which an import fills in."""
    from lm.generation.defaults import decoder_start, end_ids, generation_defaults
    from lm.hf.folder import CONFIG, GENERATION_CONFIG, read_json

    said = read_json(folder / CONFIG)
    generation = read_json(folder / GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else None
    # A call says these itself: what the folder says of them must not matter.
    one = {"max_new_tokens": 1, "num_beams": 1, "num_return_sequences": 1, "do_sample": False}
    search = generation_defaults(said, generation, prompt_len=1, **one)
    ends = end_ids({"eos_token_id": search.eos_token_id}, generation, said, {"eos_token_id": tokenizer.ids["eos"]})
    ends = tuple(i for i in ends if 0 <= i < config.model.vocab_size) or (config.objective.start_id,)
    start = decoder_start(said, generation)
    start = config.objective.decoder_start_id if start is None else start
    return dataclasses.replace(search, eos_token_id=ends), start


@dataclasses.dataclass(frozen=True)
class _Source:
    """The tokenizer of what an encoder reads in training: `end_id` closes each text."""

    tokenizer: Any
    end_id: int

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def encode(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text), self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)


class _Imported:
    """The tokenizer of a model folder, for prompts as transformers makes them: what its class puts before a text is
    the start. Nothing is padding to be kept from being drawn."""

    def __init__(self, tokenizer: HFTokenizer):
        self._tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=True)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=True)


def restore(
    workdir: str | Path | Workdir,
    *,
    step: int | None = None,
    overrides: Sequence[str] = (),
    mesh: jax.sharding.Mesh | None = None,
) -> Run:
    """The run in `workdir` (folder or address) at `step` (default: the latest), on `mesh` (default: one that fits the
    devices here).

    Needs nothing but the folder: config and tokenizer come out of the checkpoint.
    """
    workdir = Workdir.of(workdir)
    checkpoints = Checkpoints(workdir)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{workdir}: no finished checkpoint here yet")
    if step is not None and step not in steps:
        raise UserError(f"{workdir}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    meta = checkpoints.meta(step)
    resolved = Resolved.from_json(meta.config, f"{workdir}: step {step}")
    resolved = configs.overridden(resolved, overrides)
    setup = fitting_setup(resolved.config) if mesh is None else Setup.make(resolved.config, mesh)
    params = checkpoints.restore_params(step, setup.abstract_state.params)
    kept = workdir.imported if workdir.is_imported() else None
    # Prompts of an imported model may spell its special tokens.
    tokenizer = from_bytes(meta.tokenizer, f"{workdir}: tokenizer", literal=kept is None) if meta.tokenizer else None
    return Run(resolved, step, setup, params, tokenizer, kept)


class DataPosition(NamedTuple):
    """Where a run's data is after some steps. config: of the step that comes next; examples_seen: its first example.
    metas: of the checkpoints around it, whose data must be that of the corpus."""

    config: Config
    examples_seen: int
    metas: list[Meta]


def data_position(workdir: str | Path | Workdir, step: int) -> DataPosition:
    """Finds the data after `step` steps of the run in `workdir`, by the checkpoints around it, else by its config.

    UserError where the sizes of batches were changed between the two checkpoints, which do not tell at which step. Nor
    do they tell then how large the batch is that begins at the first of them.
    """
    workdir = Workdir.of(workdir)
    if not 0 <= step <= MAX_STEP:
        raise UserError(f"--step: expected 0 to {MAX_STEP}, got {step}")
    if workdir.is_imported():
        raise UserError(f"{workdir}: expected a run that was trained here, got an imported model, which read no data")
    stored = workdir.read_config()
    if stored is None:
        raise UserError(f"{workdir}: expected the --workdir of a training run, got no {workdir.config.name} there")
    metas: dict[int, Meta] = {}
    if workdir.has_checkpoints():
        checkpoints = Checkpoints(workdir)
        steps = checkpoints.steps()
        around = [*[s for s in steps if s <= step][-1:], *[s for s in steps if s > step][:1]]
        metas = {s: checkpoints.meta(s) for s in around}
    later = next((s for s in metas if s > step), None)
    text, at = (stored, workdir.config) if later is None else (metas[later].config, f"{workdir}: step {later}")
    config = Resolved.from_json(text, str(at)).config
    began = next((s for s in metas if s <= step), 0)
    seen = metas[began].examples_seen if began in metas else 0
    ramp = BatchSchedule.of(config.data)
    if later is not None and ramp.after(seen, later - began) != metas[later].examples_seen:
        raise UserError(
            f"{workdir}: expected {ramp.after(seen, later - began) - seen} examples from step {began} to {later}, got "
            f"{metas[later].examples_seen - seen}: the batch size was changed at a step whose checkpoint is gone; ask "
            f"for --step {later} or later"
        )
    return DataPosition(config, ramp.after(seen, step - began), list(metas.values()))


def fitting_setup(config: Config) -> Setup:
    """Makes the setup on the config's mesh, else on all devices as fsdp, else on one device: a run is read on other
    machines than it ran on. A mesh fits whose devices divide the batch and the parameters."""
    for mesh in (config.mesh, Mesh()):
        try:
            configs.check_mesh(dataclasses.replace(config, mesh=mesh), jax.device_count())
            return Setup.make(config, make_mesh(mesh))
        except UserError:
            continue
    return Setup.make(config, make_mesh(Mesh(), jax.devices()[:1]))


def generate(run: Run | str | Path, prompts: str | Sequence[str], **settings: Any) -> list[str]:
    """Writes the text that follows one or several prompts, or that an encoder-decoder makes of them.

    settings: of `lm.generation.Sampling`, as `generate("runs/q", "def main", temperature=0.0)`; with `beams` those of
    `lm.generation.BeamSearch`.
    """
    from lm.generation import BeamSearch, Sampling

    run = run if isinstance(run, Run) else restore(run)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    return run.generator()(prompts, (BeamSearch if "beams" in settings else Sampling)(**settings))
