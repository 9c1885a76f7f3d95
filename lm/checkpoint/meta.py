"""What stands beside the arrays of a checkpoint."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

from lm.workdir import Workdir

COMMITTED = "commit_success.txt"  # what Orbax writes last in a store, where it cannot rename a whole folder


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


def latest_meta(workdir: Workdir) -> Meta | None:
    """What stands beside the arrays of the latest finished step, read without Orbax; None where none is finished."""
    if not workdir.has_checkpoints():
        return None
    # Orbax's unfinished folders have more than digits. By number, as text puts 1000 before 200.
    steps = sorted((p for p in workdir.checkpoints.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    for step in reversed(steps):  # the last one may be half written
        meta = step / "meta" / "metadata"
        if meta.exists() and (not workdir.is_remote or (step / COMMITTED).exists()):
            return Meta.decode(json.loads(meta.read_bytes()))
    return None
