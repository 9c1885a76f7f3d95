"""Mistral (Jiang et al., 2023): LLaMA whose layers look back over a window."""

from __future__ import annotations

import dataclasses

from lm.errors import positive
from lm.models.base import windowed_layers
from lm.models.llama import Llama
from lm.nn.block import Layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mistral(Llama):
    """LLaMA with windows. window: keys that a query sees, its own included; None: all before it (from version 0.2
    on)."""

    window: int | None = 4096

    def __post_init__(self):
        super().__post_init__()
        positive("model", self, "window")

    @property
    def order(self) -> tuple[Layer, ...]:
        return windowed_layers(self.n_layers, self.window, (True,))
