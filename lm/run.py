"""The library face of a finished or running run: `restore(workdir)` and what can be done with it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from lm import config as configs
from lm.checkpoint import Checkpoints, Meta
from lm.config import Config, Resolved
from lm.data import Ramp
from lm.data.stream.batches import MAX_STEP
from lm.data.tokenizer.huggingface import HFTokenizer
from lm.data.tokenizer.slow import from_bytes
from lm.errors import UserError
from lm.mesh import Mesh, make_mesh
from lm.models import Words
from lm.training.setup import Setup, compute_dtype
from lm.workdir import Workdir

if TYPE_CHECKING:
    from lm.generation import Generator


@dataclasses.dataclass(frozen=True)
class Run:
    """The weights of one step (their moving average where one is kept) and all that belongs to them."""

    resolved: Resolved
    step: int
    setup: Setup
    params: dict
    tokenizer: Any  # lm.data.Tokenizer, which of an imported model is not literal; None: its folder had none

    @property
    def config(self) -> Config:
        return self.resolved.config

    def generator(self) -> Generator:
        """Text from this run's model."""
        from lm.generation import Generator

        if self.config.model.family != "decoder" or not isinstance(self.config.model.task, Words):
            kind = f"{type(self.config.model).__name__} for {type(self.config.model.task).__name__}"
            raise UserError(f"generate: expected a decoder of words, got {kind}; lm.hf generates with encoder-decoders")
        if self.tokenizer is None:
            raise UserError("generate: the imported folder had no tokenizer; import it again with one")
        objective = self.config.objective
        ours = not isinstance(self.tokenizer, HFTokenizer) or self.tokenizer.literal
        return Generator(
            self.config.model,
            self.params,
            self.tokenizer if ours else _Imported(self.tokenizer),
            start_id=objective.start_id if ours else None,
            pad_id=objective.pad_id if ours and objective.pad_id >= 0 else objective.start_id,
            end_id=objective.start_id,
            dtype=compute_dtype(self.config.train.precision, self.setup.mesh),
        )


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
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
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
        params = checkpoints.restore_params(step, setup.abstract_state["params"])
        trained_here = not workdir.is_imported()
    tokenizer = from_bytes(meta.tokenizer, f"{workdir}: tokenizer", literal=trained_here) if meta.tokenizer else None
    return Run(resolved, step, setup, params, tokenizer)


class Position(NamedTuple):
    """Where a run's data is after some steps. config: of the step that comes next; examples_seen: its first example.
    metas: of the checkpoints around it, whose data must be that of the corpus."""

    config: Config
    examples_seen: int
    metas: list[Meta]


def position(workdir: str | Path | Workdir, step: int) -> Position:
    """After `step` steps of the run in `workdir`, by the checkpoints before and after, and else by its config.

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
        with contextlib.closing(Checkpoints(workdir)) as checkpoints:
            steps = checkpoints.steps()
            around = [*[s for s in steps if s <= step][-1:], *[s for s in steps if s > step][:1]]
            metas = {s: checkpoints.meta(s) for s in around}
    later = next((s for s in metas if s > step), None)
    text, at = (stored, workdir.config) if later is None else (metas[later].config, f"{workdir}: step {later}")
    config = Resolved.from_json(text, str(at)).config
    began = next((s for s in metas if s <= step), 0)
    seen = metas[began].examples_seen if began in metas else 0
    ramp = Ramp.of(config.data)
    if later is not None and ramp.after(seen, later - began) != metas[later].examples_seen:
        raise UserError(
            f"{workdir}: expected {ramp.after(seen, later - began) - seen} examples from step {began} to {later}, got "
            f"{metas[later].examples_seen - seen}: the batch size was changed at a step whose checkpoint is gone; ask "
            f"for --step {later} or later"
        )
    return Position(config, ramp.after(seen, step - began), list(metas.values()))


def fitting_setup(config: Config) -> Setup:
    """On the config's mesh, else on all devices as fsdp, else on one device: a run is read on other machines than it
    ran on. A mesh fits whose devices divide the batch and the parameters."""
    for mesh in (config.mesh, Mesh()):
        try:
            configs.check_mesh(dataclasses.replace(config, mesh=mesh), jax.device_count())
            return Setup.make(config, make_mesh(mesh))
        except UserError:
            continue
    return Setup.make(config, make_mesh(Mesh(), jax.devices()[:1]))


def generate(run: Run | str | Path, prompts: str | Sequence[str], **sampling: Any) -> list[str]:
    """Completions of one or several prompts: `generate("runs/q", "def main", temperature=0.0)`."""
    from lm.generation import Sampling

    run = run if isinstance(run, Run) else restore(run)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    return run.generator()(prompts, Sampling(**sampling))
