"""What stands beside the arrays of a checkpoint."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

from etils import epath

from lm.checkpoint import integrity
from lm.errors import UserError
from lm.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Meta:
    """`config` is the text of a resolved config; `data` the fingerprint of the data order."""

    config: str
    tokenizer: bytes
    examples_seen: int
    data: dict[str, Any]
    versions: dict[str, str]

    def encode(self) -> dict[str, Any]:
        # JSON holds no bytes.
        return dataclasses.asdict(self) | {"tokenizer": base64.b64encode(self.tokenizer).decode()}

    @classmethod
    def decode(cls, tree: dict[str, Any]) -> Meta:
        return cls(**(tree | {"tokenizer": base64.b64decode(tree["tokenizer"])}))

    @classmethod
    def read(cls, step: epath.Path) -> Meta:
        """What stands in a step folder. Raises UserError where it does not, or is damaged."""
        if found := integrity.damage(step, ("meta",)):
            raise UserError(f"{step}: expected a whole checkpoint, got a damaged one: {found}; {integrity.LOOK}")
        try:
            return cls.decode(json.loads((step / "meta" / integrity.JSON_ITEMS["meta"]).read_bytes()))
        except (TypeError, KeyError, ValueError) as e:
            raise UserError(
                f"{step}/meta: expected what a run keeps beside its arrays, got something else ({e}); {integrity.LOOK}"
            ) from e


def latest_meta(workdir: Workdir) -> Meta | None:
    """What stands beside the arrays of the latest step where it is whole, read without Orbax; None without any."""
    if not workdir.has_checkpoints():
        return None
    steps = [workdir.checkpoints / str(n) for n in reversed(integrity.steps(workdir.checkpoints))]
    whole = (step for step in steps if integrity.damage(step, ("meta",)) is None)
    return Meta.read(next(whole, steps[0])) if steps else None
