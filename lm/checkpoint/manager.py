"""Checkpoints: the state, sharded and written in the background, and beside it all that a restore needs.

A step folder holds three items: `params` (and `ema`), `train` (optimizer state and step) and `meta`, a JSON with the
resolved config, the tokenizer, the data position and the versions that wrote it; and the checksums of its files. It
gets its name once all of them are there (`Sealed`), and what is read of it is compared with them first. Trees and
shapes are compared before anything is read, so a wrong checkpoint is a message and not a half-filled model.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from lm import distributed
from lm.checkpoint import integrity
from lm.checkpoint.compare import WAY_OUT, compare, shapes_of
from lm.checkpoint.format import array_handler, restore_args, sealed
from lm.checkpoint.integrity import Damage, Depth
from lm.checkpoint.meta import Meta
from lm.checkpoint.policy import Checkpoint, best, preservation
from lm.errors import UserError
from lm.files import Log
from lm.workdir import Workdir

WEIGHTS = ("ema", "params")  # items with weights: of those there are the first is evaluated
EVERY = "*"  # for all items of a step
SET_ASIDE = "damaged"  # what the name of a step folder gets that is not whole


class Whole(NamedTuple):
    """The newest step that is whole; None: there is none. damaged: what is wrong with those that are not."""

    step: int | None
    damaged: dict[int, Damage]


class Checkpoints:
    """The checkpoints of one run folder. `policy` None opens it for reading only. log: gets a line for each step that
    `policy.verify` looked at."""

    def __init__(self, workdir: str | Path | Workdir, policy: Checkpoint | None = None, log: Log = print):
        self.workdir, self._policy, self._log = Workdir.of(workdir), policy, log
        if policy is None and not self.workdir.has_checkpoints():
            raise UserError(f"{self.workdir}: no checkpoints here; expected the --workdir of a training run")
        # Orbax takes no relative path; the absolute one of an address would be a local path.
        folder = self.workdir.checkpoints
        self.folder = folder if self.workdir.is_remote else epath.Path(os.path.abspath(folder))
        self._arrays = array_handler()
        self._whole = set[tuple[int, str]]()  # items of steps that nothing was found wrong with
        self._reread = list[Future]()
        # Else a step that has lost its checksums would be taken for one of an older version.
        self._sealed_by = None if self.workdir.is_remote else {"checksums": integrity.ALGORITHM}
        if policy is not None:
            self._manager = self._saving(policy)

    def _saving(self, policy: Checkpoint) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation(policy),
            max_to_keep=None,
            temporary_path_class=sealed(remote=self.workdir.is_remote, then=self._saved),
            **best(policy),
        )
        handlers = {item: array_handler() for item in (*WEIGHTS, "train")}
        return ocp.CheckpointManager(
            self.folder, options=options, item_handlers=handlers | {"meta": ocp.JsonCheckpointHandler()}
        )

    def steps(self) -> list[int]:
        """The steps that were finished, ascending."""
        return integrity.steps(self.folder)

    def latest(self) -> int | None:
        steps = self.steps()
        return steps[-1] if steps else None

    def newest_whole(self, compare: Callable[[int], None] = lambda step: None) -> Whole:
        """Finds the newest step that can be restored. It is read through, and of those before it what is small. All
        processes of a run find the same. compare: refuses a step; called before it is read through."""
        whole, damaged = None, dict[int, Damage]()
        for step in reversed(distributed.of_main(self.steps())):
            found = self._damage(step, None, "quick")
            if found is None and whole is None:
                distributed.together(functools.partial(compare, step))
                found = self._damage(step, None)
                whole = step if found is None else None
            if found is not None:
                damaged[step] = found
        return Whole(whole, damaged)

    def set_aside(self, step: int) -> epath.Path:
        """Gives the folder of a step a name that is no step's; it stays as it is. Only where no other process may."""
        names = (f"{step}.{SET_ASIDE}{n}" for n in ("", *range(2, 1000)))
        target = next(self.folder / name for name in names if not (self.folder / name).exists())
        return (self.folder / str(step)).rename(target)

    def save(self, step: int, state: Any, meta: Meta, metrics: dict[str, float] | None = None) -> None:
        """Copies the state off the devices and returns; the files are written in the background.

        state: `lm.training.state.State`, or another record with its fields.
        """
        arrays = {k: ocp.args.PyTreeSave(v) for k, v in _items(state).items()}
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta.encode()), **arrays)
        with self._disk_errors():
            # The loop decides, not Orbax's own interval.
            self._manager.save(step, args=args, metrics=metrics, force=True, custom_metadata=self._sealed_by)

    def save_params(self, step: int, params: dict[str, Any], meta: Meta) -> None:
        """Saves weights alone, of a model that was not trained here; nothing can be resumed from them."""
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta.encode()), params=ocp.args.PyTreeSave(params))
        with self._disk_errors():
            self._manager.save(step, args=args, force=True, custom_metadata=self._sealed_by)

    def meta(self, step: int) -> Meta:
        """What stands beside the arrays of a step."""
        if found := self._damage(step, ("meta",), "quick"):
            raise UserError(self._damaged(step, found))
        return Meta.read(self.folder / str(step))

    def check(self, step: int, abstract_state: Any) -> None:
        """Raises UserError where the stored trees are not those of `abstract_state`; no array is read."""
        self._check(step, _items(abstract_state), WAY_OUT)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of a step in the shardings of `abstract_state`, whose type it has."""
        found = self._restore(step, _items(abstract_state), WAY_OUT)
        return abstract_state._replace(params=found["params"], ema=found.get("ema"), **found["train"])

    def check_params(self, step: int, abstract_params: Any, way_out: str = WAY_OUT) -> None:
        """Raises UserError where `restore_params` would, damage in large files apart; no array is read."""
        item = self._weights(step)
        self._check(step, {item: abstract_params}, way_out)

    def restore_params(self, step: int, abstract_params: Any, way_out: str = WAY_OUT) -> Any:
        """Restores the weights alone, their moving average where the run kept one. way_out: ends the error."""
        item = self._weights(step)
        return self._restore(step, {item: abstract_params}, way_out)[item]

    def wait(self) -> None:
        """Waits until what was saved is on disk, and was looked at where the policy says so."""
        with self._disk_errors():
            self._manager.wait_until_finished()  # raises what the background save did
        while self._reread:
            self._reread.pop().result()

    def close(self) -> None:
        if self._policy is not None:
            with self._disk_errors():
                self._manager.close()
            while self._reread:
                self._reread.pop().result()

    def _weights(self, step: int) -> str:
        there = integrity.look(self.folder / str(step)).items
        return next((item for item in WEIGHTS if item in there), "params")

    def _restore(self, step: int, wanted: dict[str, Any], way_out: str) -> dict[str, Any]:
        self._check(step, wanted, way_out)  # Orbax itself may restore a part of a larger tree and say nothing
        if found := self._damage(step, wanted):
            raise UserError(self._damaged(step, found))
        folder = self.folder / str(step)
        if not integrity.look(folder).sealed and not self.workdir.is_remote:
            print(f"{folder}: saved without checksums, by an older version: damage may go unseen", file=sys.stderr)
        with self._reading(step):
            return {k: self._arrays.restore(folder / k, args=restore_args(v)) for k, v in wanted.items()}

    def _check(self, step: int, wanted: dict[str, Any], way_out: str) -> None:
        folder = self.folder / str(step)
        stored = [item for item in integrity.look(folder).items if item not in integrity.JSON_ITEMS]
        for item, tree in wanted.items():
            where = f"{folder}/{item}"
            if item not in stored:
                if found := self._damage(step, None, "quick"):
                    raise UserError(self._damaged(step, found))
                raise UserError(f"{where}: not in this checkpoint, which has {', '.join(stored)}; {way_out}")
            if found := self._damage(step, (item,), "quick"):
                raise UserError(self._damaged(step, found))
            with self._reading(step):
                shapes = shapes_of(self._arrays.metadata(folder / item).tree)
            compare(shapes, shapes_of(tree), where, way_out)

    def _damage(self, step: int, items: Collection[str] | None, depth: Depth = "full") -> Damage | None:
        """As `integrity.damage`, of what was not read through before. Processes read a part each, and all find what one
        of them does."""
        wanted = (EVERY,) if items is None else tuple(items)
        if all((step, item) in self._whole for item in wanted):
            return None
        share = (jax.process_index(), jax.process_count()) if depth == "full" else (0, 1)
        folder = self.folder / str(step)
        found = distributed.together(lambda: integrity.damage(folder, items, depth, share))
        if distributed.any_process(found is not None):
            found = found or Damage("a file", "another process found it damaged")
        if found is None and (depth == "full" or self.workdir.is_remote):  # of a store no look reads more
            more = integrity.look(folder).items if items is None else ()
            self._whole |= {(step, item) for item in (*wanted, *more)}
        return found

    def _damaged(self, step: int, found: Damage) -> str:
        whole = [s for s in self.steps() if s != step and not integrity.damage(self.folder / str(s), depth="quick")]
        way_out = "there is no other that is whole; bring its files back"
        if whole:
            way_out = f"step {whole[-1]} is whole by names and sizes: take --step {whole[-1]}, or move this folder away"
        return f"{self.folder / str(step)}: expected a whole checkpoint, got a damaged one: {found}; {way_out}"

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """What the readers of a file raise, of a file that nothing was found wrong with."""
        try:
            yield
        except (OSError, ValueError, KeyError) as e:
            if isinstance(e, UserError):
                raise
            what = str(e).strip().partition("\n")[0].partition(" [")[0]
            folder = self.folder / str(step)
            if integrity.look(folder).sealed:
                raise UserError(
                    f"{folder}: expected to read it, got {what}; its files are as they were saved: try again"
                ) from e
            raise UserError(self._damaged(step, Damage("a file", f"cannot be read: {what}"))) from e

    def _saved(self, folder: epath.Path) -> None:
        """Reads a step again that was just saved, where the policy says so: on a thread of its own."""
        if self._policy is None or not self._policy.verify or self.workdir.is_remote:
            return
        pool = ThreadPoolExecutor(1)
        self._reread.append(pool.submit(self._verify, folder))
        pool.shutdown(wait=False)

    def _verify(self, folder: epath.Path) -> None:
        with contextlib.suppress(OSError):  # which the next look names
            _drop_cached(folder)
        found = integrity.damage(folder)
        if int(folder.name) in self._manager.all_steps():  # else the policy has let go of it meanwhile
            self._log(
                f"checkpoint of step {folder.name} " + (f"is damaged: {found}" if found else "is as it was saved")
            )

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            full = isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)
            # TensorStore's errors say it in text alone.
            if full or "No space left on device" in str(e) or "Disk quota exceeded" in str(e):
                kept = ", ".join(map(str, self.steps())) or "none"
                raise UserError(
                    f"{self.folder}: disk full while saving; steps kept: {kept}; "
                    f"free space or lower checkpoint.keep_last, then run the same command to go on"
                ) from e
            raise


def _drop_cached(folder: epath.Path) -> None:
    """Lets the system forget what it keeps of the files in memory, or reading them would not read the disk."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with open(path, "rb") as f:
                os.fsync(f.fileno())
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _items(state: Any) -> dict[str, Any]:
    """The items of a step folder. A record without a moving average has no item for it."""
    # Weights are read without the optimizer's state.
    items = {"params": state.params, "train": {"step": state.step, "opt": state.opt}}
    return items if state.ema is None else items | {"ema": state.ema}
