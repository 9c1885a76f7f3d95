"""What stands beside the arrays of a checkpoint."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Meta:
    """`config` is the text of a resolved config; `data` the fingerprint of the data order."""

    config: str
    tokenizer: bytes
    examples_seen: int
    data: dict[str, Any]
    versions: dict[str, str]

    def encode(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"tokenizer": base64.b64encode(self.tokenizer).decode()}

    @classmethod
    def decode(cls, tree: dict[str, Any]) -> Meta:
        return cls(**(tree | {"tokenizer": base64.b64decode(tree["tokenizer"])}))
