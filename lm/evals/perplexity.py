"""Loss and perplexity on the validation split of each source; of a language model, bits per byte beside compressors.

Bits per byte counts the bytes of the original text that the predicted tokens stand for, so models with different
tokenizers compare. Where a model sees some of the text it predicts, or predicts only some, there is no such number.
"""

from __future__ import annotations

import dataclasses
import lzma
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lm.distributed import Pace
from lm.objectives import Score


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """`loss` in nats per `unit` (see `Objective.unit`); sums are kept so that sources add up.

    tokens: how many were predicted. n_bytes: of original text that they stand for.
    """

    nats: float
    tokens: int
    n_bytes: int
    unit: str = "token"

    @property
    def loss(self) -> float:
        return self.nats / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp leaves float64 above 709

    @property
    def bits_per_byte(self) -> float | None:
        """None where `nats` is not the length of the text."""
        return self.nats / math.log(2) / max(self.n_bytes, 1) if self.unit == "token" else None

    def record(self) -> dict[str, float]:
        """What is known: nothing but the counts where nothing was predicted."""
        counts: dict[str, float] = {"tokens": self.tokens, "bytes": self.n_bytes}
        if not self.tokens:
            return counts
        bits = {} if self.bits_per_byte is None else {"bits_per_byte": self.bits_per_byte}
        return {"loss": self.loss, "perplexity": self.perplexity, **bits, **counts}

    def __str__(self) -> str:
        if not self.tokens:
            return f"nothing to predict (0 {self.unit}s)"
        bits = "" if self.bits_per_byte is None else f"  bits/byte {self.bits_per_byte:.4f}"
        per = "" if self.unit == "token" else f" per {self.unit}"
        return f"loss {self.loss:.4f}{per}  perplexity {self.perplexity:.2f}{bits}  ({self.tokens:,} {self.unit}s)"


def totals(score: Any) -> Any:
    """`score`, jitted to give the sums of a batch: each row's in float32, then those of the rows."""

    @jax.jit
    def of_batch(params: Any, batch: dict[str, jax.Array], token_bytes: jax.Array) -> Score:
        return jax.tree.map(jnp.sum, score(params, batch, token_bytes))

    return of_batch


def evaluate(
    score: Any, params: Any, batches: Iterable[dict[str, jax.Array]], token_bytes: ArrayLike, unit: str = "token"
) -> Perplexity:
    """Sums `score(params, batch, token_bytes)`, which has the sums of a batch, over batches."""
    sums: list[Score] = []
    pace = Pace()
    for batch in batches:
        sums.append(score(params, batch, token_bytes))
        pace(sums[-1])
    host = jax.device_get(sums)
    return Perplexity(
        nats=sum(float(s.nll) for s in host),  # in float64: a float32 would stop growing with the batches
        tokens=round(sum(float(s.weight) for s in host)),
        n_bytes=sum(int(s.n_bytes) for s in host),
        unit=unit,
    )


def total(results: Mapping[str, Perplexity]) -> Perplexity:
    """Adds up all sources, which are of one unit."""
    return Perplexity(
        nats=sum(r.nats for r in results.values()),
        tokens=sum(r.tokens for r in results.values()),
        n_bytes=sum(r.n_bytes for r in results.values()),
        unit=next((r.unit for r in results.values()), "token"),
    )


@dataclasses.dataclass(frozen=True)
class Compressed:
    """Bits per byte of `gzip -9` and `xz -9` over a text taken as one stream."""

    gzip: float
    xz: float


def compress(text: bytes) -> Compressed:
    n = max(len(text), 1)
    gzip = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: with gzip's header, as the command writes it
    return Compressed(
        gzip=8 * len(gzip.compress(text) + gzip.flush()) / n,
        xz=8 * len(lzma.compress(text, preset=9)) / n,
    )
