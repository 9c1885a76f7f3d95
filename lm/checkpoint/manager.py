"""Checkpoints: the state, sharded and written in the background, and beside it all that a restore needs.

A step folder holds three items: `params` (and `ema`), `train` (optimizer state and step) and `meta`, a JSON with the
resolved config, the tokenizer, the data position and the versions that wrote it. Trees and shapes are compared before
anything is read, so a wrong checkpoint is a message and not a half-filled model. Orbax renames a finished folder into
place: what is listed is whole.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lm.checkpoint.compare import WAY_OUT, compare, shapes_of
from lm.checkpoint.meta import Meta
from lm.checkpoint.policy import preservation
from lm.errors import UserError
from lm.workdir import Workdir

# Orbax warns about every tree restored onto other devices, which is what restoring is for.
logging.getLogger("absl").setLevel(logging.ERROR)


SLICE_BYTES = 1 << 20  # an array that devices hold alike is written by all of them if each has so much: slices compile


class Checkpoints:
    """The checkpoints of one run folder. `policy` None opens it for reading only."""

    def __init__(self, workdir: str | Path | Workdir, policy: Any = None):
        self.workdir = Workdir.of(workdir)
        if policy is None and not self.workdir.has_checkpoints():
            raise UserError(f"{self.workdir}: no checkpoints here; expected the --workdir of a training run")
        # Orbax takes no relative path; the absolute one of an address would be a local path.
        folder = self.workdir.checkpoints
        self.folder = folder if self.workdir.is_remote else epath.Path(os.path.abspath(folder))
        options = ocp.CheckpointManagerOptions(read_only=True)
        if policy is not None:
            options = ocp.CheckpointManagerOptions(preservation_policy=preservation(policy), max_to_keep=None)
        handlers = {item: _arrays() for item in ("params", "ema", "train")}
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_handlers=handlers | {"meta": ocp.JsonCheckpointHandler()}
        )

    def steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, step: int, state: Any, meta: Meta, metrics: dict[str, float] | None = None) -> None:
        """Copies the state off the devices and returns; the files are written in the background.

        state: `lm.training.state.State`, or another record with its fields.
        """
        arrays = {k: ocp.args.PyTreeSave(v) for k, v in _items(state).items()}
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta.encode()), **arrays)
        with self._disk_errors():
            # The loop decides, not Orbax's own interval.
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def save_params(self, step: int, params: dict[str, Any], meta: Meta) -> None:
        """Saves weights alone, of a model that was not trained here; nothing can be resumed from them."""
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta.encode()), params=ocp.args.PyTreeSave(params))
        with self._disk_errors():
            self._manager.save(step, args=args, force=True)

    def meta(self, step: int) -> Meta:
        """What stands beside the arrays of a step."""
        restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return Meta.decode(restored["meta"])

    def check(self, step: int, abstract_state: Any) -> None:
        """Raises UserError where the stored trees are not those of `abstract_state`; no array is read."""
        self._check(step, _items(abstract_state), WAY_OUT)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of a step in the shardings of `abstract_state`, whose type it has."""
        found = self._restore(step, _items(abstract_state))
        return abstract_state._replace(params=found["params"], ema=found.get("ema"), **found["train"])

    def check_params(self, step: int, abstract_params: Any, way_out: str = WAY_OUT) -> None:
        """Raises UserError where `restore_params` would; no array is read."""
        self._check(step, {self._weights(step): abstract_params}, way_out)

    def restore_params(self, step: int, abstract_params: Any, way_out: str = WAY_OUT) -> Any:
        """Restores the weights alone, their moving average where the run kept one. way_out: ends the error."""
        item = self._weights(step)
        return self._restore(step, {item: abstract_params}, way_out)[item]

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        with self._disk_errors():
            self._manager.wait_until_finished()  # raises what the background save did

    def close(self) -> None:
        with self._disk_errors():
            self._manager.close()

    def _weights(self, step: int) -> str:
        return "ema" if "ema" in self._shapes(step) else "params"

    def _restore(self, step: int, wanted: dict[str, Any], way_out: str = WAY_OUT) -> dict[str, Any]:
        self._check(step, wanted, way_out)  # Orbax itself may restore a part of a larger tree and say nothing
        args = ocp.args.Composite(**{k: _restore(v) for k, v in wanted.items()})
        restored = self._manager.restore(step, args=args)
        return {k: restored[k] for k in wanted}

    def _check(self, step: int, wanted: dict[str, Any], way_out: str) -> None:
        stored = self._shapes(step)
        for item, tree in wanted.items():
            where = f"{self.folder}/{step}/{item}"
            if item not in stored:
                raise UserError(f"{where}: not in this checkpoint, which has {', '.join(sorted(stored))}; {way_out}")
            compare(stored[item], shapes_of(tree), where, way_out)

    def _shapes(self, step: int) -> dict[str, dict[str, tuple[int, ...]]]:
        """Returns item -> path -> shape, as stored."""
        metadata = self._manager.item_metadata(step)
        trees = {k: v for k, v in metadata.items() if v is not None and k not in ("meta", "metrics")}
        return {k: shapes_of(getattr(v, "tree", v)) for k, v in trees.items()}

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


def _arrays() -> ocp.PyTreeCheckpointHandler:
    """A file for each shard of each array, as it is: OCDBT, which packs them, takes 4 to 6 times as long to write, and
    finds what it packs by a glob of the whole path, brackets in the name of a folder included. Steps that were packed
    are read."""
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (jax.Array, handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE_BYTES)),
        (np.ndarray, handlers.NumpyHandler()),
    )
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)


def _restore(tree: Any) -> ocp.args.PyTreeRestore:
    """Into the shapes, dtypes and shardings of `tree`."""
    return ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))


def _items(state: Any) -> dict[str, Any]:
    """The items of a step folder. A record without a moving average has no item for it."""
    # Weights are read without the optimizer's state.
    items = {"params": state.params, "train": {"step": state.step, "opt": state.opt}}
    return items if state.ema is None else items | {"ema": state.ema}
