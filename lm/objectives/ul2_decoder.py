"""UL2 on a decoder: the inputs of a denoiser and then its targets, in one row.

Inputs and targets make up for each other's lengths, so that less is padding: 19 % of a batch with the denoisers of the
paper on 512 tokens of text, where inputs and targets on their own have 31 %. The rest is room for the sentinels of the
denoiser with the most spans.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lm.errors import UserError
from lm.models import Architecture
from lm.models.cost import Row
from lm.objectives.base import Loss, Score
from lm.objectives.prefix_lm import PrefixLM
from lm.objectives.ul2 import UL2


@dataclasses.dataclass(frozen=True, kw_only=True)
class UL2Decoder(UL2):
    """Tay et al., 2022, for decoders: [mode] inputs targets in one row, of which all that comes before the
    targets is a prefix that is read both ways. The loss is on the targets. `chunks` divides `longest(seq_len)`.

    router_balance, router_z: as in `CausalLM`.
    """

    family: ClassVar[Architecture] = "decoder"

    router_balance: float = 0.01
    router_z: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self._prefix_lm()  # refuses what is wrong in the fields that they share

    @property
    def unit(self) -> str:
        return "target"

    @property
    def decoder_start_id(self) -> int:
        return self.start_id

    def longest(self, seq_len: int) -> int:
        return self._slots(seq_len) - 1

    def row(self, seq_len: int) -> Row:
        return Row(self.longest(seq_len), self.longest(seq_len))

    def check(self, seq_len: int) -> None:
        self._check_denoisers(seq_len)
        n = self.longest(seq_len)
        if n % self.chunks:
            raise UserError(
                f"objective.chunks: {self.chunks} does not divide the {n} tokens that data.seq_len {seq_len} becomes"
            )

    def features(self, batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        """tokens [B,N+1] and prefix bool [B,N], N = `longest(seq_len)`."""
        return self._prefix_lm().features(batch_size, self.longest(seq_len))

    def examples(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        both = super().examples(rows)
        apart = np.hstack([both["inputs"], both["targets"]])
        real = apart != self.pad_id
        width = self._slots(rows["tokens"].shape[1] - 1)
        tokens = np.full((len(apart), width), self.pad_id, np.int32)
        tokens[np.arange(width) < real.sum(axis=1, keepdims=True)] = apart[real]
        n_inputs = (both["inputs"] != self.pad_id).sum(axis=1, keepdims=True)
        return {"tokens": tokens, "prefix": np.arange(width - 1) < n_inputs}

    def loss(self, model: Any, batch: dict[str, jax.Array], *, dtype: DTypeLike, key: jax.Array | None) -> Loss:
        return self._prefix_lm().loss(model, batch, dtype=dtype, key=key)

    def score(self, model: Any, batch: dict[str, jax.Array], token_bytes: jax.Array, *, dtype: DTypeLike) -> Score:
        index = jnp.arange(token_bytes.shape[0])
        # They stand for no bytes of text.
        is_sentinel = (index <= self.first_sentinel_id) & (index > self.first_sentinel_id - self.n_sentinels)
        return self._prefix_lm().score(model, batch, jnp.where(is_sentinel, 0, token_bytes), dtype=dtype)

    def _prefix_lm(self) -> PrefixLM:
        return PrefixLM(
            document_mask=False,  # a row is one text, whose eos ends the targets
            z_loss=self.z_loss,
            chunks=self.chunks,
            router_balance=self.router_balance,
            router_z=self.router_z,
            start_id=self.start_id,
            pad_id=self.pad_id,
        )

    def _slots(self, seq_len: int) -> int:
        return int(self.lengths(seq_len).sum(axis=1).max())
