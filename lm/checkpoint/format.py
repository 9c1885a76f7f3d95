"""How arrays lie in a step folder, and how the folder is finished: what Orbax is asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.path import atomicity

from lm.checkpoint import integrity
from lm.errors import UserError

# Orbax warns about every tree restored onto other devices, which is what restoring is for, and writes the traceback of
# an error that it also raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)

SLICE_BYTES = 1 << 20  # an array that devices hold alike is written by all of them if each has so much: slices compile


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """A file for each shard of each array, as it is: OCDBT, which packs them, takes 4 to 6 times as long to write, and
    finds what it packs by a glob of the whole path, brackets in the name of a folder included. Steps that were packed
    are read."""
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (jax.Array, handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE_BYTES)),
        (np.ndarray, handlers.NumpyHandler()),
    )
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)


def restore_args(tree: Any) -> ocp.args.PyTreeRestore:
    """Into the shapes, dtypes and shardings of `tree`."""
    return ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))


def sealed(*, remote: bool, then: Callable[[epath.Path], None]) -> type:
    """The class by which Orbax finishes a step folder: what a restore needs must be there, and gets its checksums,
    before the folder gets its name (in a store: its mark). then: is called with the finished folder."""
    base: type = atomicity.CommitFileTemporaryPath if remote else atomicity.AtomicRenameTemporaryPath

    class Sealed(base):  # type: ignore[misc, valid-type]
        async def finalize(self) -> None:
            target = self.get_final()
            if not target.name.isdigit():  # an item of a step: the step comes when they are finished
                await super().finalize()
                return
            if lacking := await asyncio.to_thread(integrity.seal, self.get()):
                raise UserError(
                    f"{target}: expected a checkpoint that can be restored, got one with {lacking}; it is "
                    "not kept; see whether the disk is whole, then run the same command to go on"
                )
            await super().finalize()
            then(target)

    return Sealed
