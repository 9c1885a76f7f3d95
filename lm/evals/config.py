"""The settings of evaluation."""

from __future__ import annotations

import dataclasses

from lm.errors import not_negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluation on the validation split of each source; `max_batches` 0: all of it."""

    max_batches: int = 0

    def __post_init__(self):
        not_negative("eval", self, "max_batches")
