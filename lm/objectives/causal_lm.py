"""Next-token prediction over packed documents.

A row holds seq_len + 1 tokens of the store. One token, `start_id`, ends a document and opens the next, as GPT-2's
<|endoftext|> does: every document is the input [start, t1 .. tn] with the targets [t1 .. tn, start], so no target is
wasted and a packed document sees exactly what it would see alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lm.errors import UserError
from lm.nn.moe import Router
from lm.objectives import noise
from lm.objectives.base import Loss, Objective, Predictions, Score, router_loss
from lm.objectives.cross_entropy import cross_entropy
from lm.sharding import constrain


class Packed(NamedTuple):
    """What the step derives from a row: all [B,S]."""

    inputs: jax.Array
    targets: jax.Array
    segments: jax.Array  # number of the document within the row
    positions: jax.Array  # place within the document
    weights: jax.Array  # 1.0 where the target counts, 0.0 where it is padding or predicted from padding


def unpack(tokens: jax.Array, start_id: int, pad_id: int) -> Packed:
    """tokens [B,S+1] -> inputs, targets, segments, positions and weights.

    Padding within a row stands for documents left out (`lm.data.stream.exclude`). It is of the segment before it, whose
    text it comes after, and the separator after it opens the next: no token sees it, and what is predicted from it,
    that separator, does not count.
    """
    tokens = constrain(tokens, "act_batch", None)  # S + 1 tokens, which the mesh axis of the sequence does not divide
    inputs, targets = (constrain(t, "act_batch", "act_seq") for t in (tokens[:, :-1], tokens[:, 1:]))
    opens = inputs == start_id
    index = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    begins = jax.lax.cummax(jnp.where(opens, index, 0), axis=1)
    counts = (targets != pad_id) & ((inputs != pad_id) | opens)  # one id may be both
    return Packed(
        inputs,
        targets,
        jnp.cumsum(opens, axis=1, dtype=jnp.int32),
        index - begins,
        counts.astype(jnp.float32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLM(Objective):
    """`document_mask`: attention and positions start anew with each document. Without it a row is one text, from which
    documents left out are gone (`noise.closed`). `chunks`: see `cross_entropy`.

    router_balance, router_z: weights of the two losses of a mixture of experts (see `lm.nn.moe`), per target.
    """

    document_mask: bool = True
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunks: int = 1
    router_balance: float = 0.01  # Fedus et al., 2021, section 2.2
    router_z: float = 0.0

    def __post_init__(self):
        if self.chunks < 1:
            raise UserError(f"objective.chunks: expected at least 1, got {self.chunks}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"objective.label_smoothing: expected a rate in [0, 1), got {self.label_smoothing}")
        for name in ("z_loss", "router_balance", "router_z"):
            if getattr(self, name) < 0.0:
                raise UserError(f"objective.{name}: expected 0 or more, got {getattr(self, name)}")

    def check(self, seq_len: int) -> None:
        if seq_len % self.chunks:
            raise UserError(f"objective.chunks: {self.chunks} does not divide data.seq_len {seq_len}")

    def features(self, batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"tokens": jax.ShapeDtypeStruct((batch_size, seq_len + 1), jnp.int32)}

    def examples(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"tokens": self._text(rows)}

    def loss(self, model: Any, batch: dict[str, jax.Array], *, dtype: DTypeLike, key: jax.Array | None) -> Loss:
        predictions, router = self.predictions(model, batch, dtype=dtype, key=key)
        head, params = model.head_fn()
        total, nll = cross_entropy(head, params, *predictions, self.z_loss, self.label_smoothing, self.chunks)
        weight = jnp.sum(predictions.weights)
        # Per target, since the step divides by their number.
        return Loss(total + weight * router_loss(router, self.router_balance, self.router_z), nll, weight)

    def score(self, model: Any, batch: dict[str, jax.Array], token_bytes: jax.Array, *, dtype: DTypeLike) -> Score:
        predictions, _ = self.predictions(model, batch, dtype=dtype, key=None)
        # A target that does not count must not add bytes.
        n_bytes = jnp.where(predictions.weights > 0, token_bytes[predictions.targets], 0)
        return predictions.score(model, n_bytes, self.chunks)

    def predictions(
        self, model: Any, batch: dict[str, jax.Array], *, dtype: DTypeLike, key: jax.Array | None
    ) -> tuple[Predictions, Router | None]:
        """Predicts the token after each; returns what a mixture of experts did for it too."""
        packed = unpack(batch["tokens"], self.start_id, self.pad_id)
        weights = self.weights(batch, packed)
        within = {"positions": packed.positions, "segments": packed.segments} if self.document_mask else {}
        out = model(packed.inputs, dtype=dtype, key=key, valid=packed.weights > 0, **within, **self.seen(batch))
        return Predictions(out.hidden, packed.targets, weights), out.router

    def weights(self, batch: dict[str, jax.Array], packed: Packed) -> jax.Array:
        """float32 [B,S]: what each target counts."""
        return packed.weights

    def seen(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """What more the model is told of who sees whom."""
        return {}

    def _text(self, rows: dict[str, np.ndarray]) -> np.ndarray:
        tokens = rows["tokens"]
        return tokens if self.document_mask else noise.closed(tokens, self.pad_id, self.start_id)
