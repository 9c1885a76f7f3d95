"""Next-token prediction after a prefix that is read both ways, on a decoder.

Every document of a row is cut at a point drawn for it. The tokens before it see each other in both directions, within
their document; those after it are predicted as ever. It is `CausalLM` in all else: rows, packing, options.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError
from lm.objectives import noise
from lm.objectives.causal_lm import CausalLM, Packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLM(CausalLM):
    """Raffel et al., 2020, 3.2.1; Wang et al., 2022, "What language model architecture and pretraining objective works
    best for zero-shot generalization?".

    Of a document with n targets in the row, the prefix is its start and floor(f n) further tokens, at most n - 1, with
    f uniform from `min_prefix` to `max_prefix`: at least one target is left, and f = 0 is causal. The part of a
    document that a row holds is a document, and without `document_mask` the row is one.

    loss_on: "suffix" counts the targets after the prefix. "all" counts every target, as T5X does where
        loss_on_targets_only is off; a token of the prefix sees its own, so most of that is copying.
    """

    min_prefix: float = 0.0
    max_prefix: float = 1.0
    loss_on: Literal["suffix", "all"] = "suffix"
    noise_seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.min_prefix <= self.max_prefix <= 1.0:
            raise UserError(
                "objective.min_prefix, objective.max_prefix: expected shares of a document, 0 <= min <= max <= 1, got "
                f"{self.min_prefix}, {self.max_prefix}"
            )

    @property
    def unit(self) -> str:
        return "suffix token" if self.loss_on == "suffix" else "target"

    def features(self, batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        """tokens [B,S+1] and prefix bool [B,S], of the inputs."""
        prefix = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.bool_)
        return super().features(batch_size, seq_len) | {"prefix": prefix}

    def examples(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens = self._text(rows)
        inputs = tokens[:, :-1]
        real = (tokens[:, 1:] != self.pad_id) & ((inputs != self.pad_id) | (inputs == self.start_id))  # as in `unpack`
        n, length = inputs.shape
        index = np.arange(length)
        opens = inputs == self.start_id if self.document_mask else np.zeros(inputs.shape, bool)
        begins = np.maximum.accumulate(np.where(opens, index, 0), axis=1)
        document = begins + np.arange(n)[:, None] * length
        n_targets = np.bincount(document[real], minlength=n * length)[document]
        u = noise.uniform(noise.draw_at(self.noise_seed, "prefix_lm", rows["id"], begins))
        share = self.min_prefix + (self.max_prefix - self.min_prefix) * u
        further = np.minimum((share * n_targets).astype(np.int64), n_targets - 1)  # -1 where there is only padding
        return {"tokens": tokens, "prefix": index - begins <= further}

    def weights(self, batch: dict[str, jax.Array], packed: Packed) -> jax.Array:
        if self.loss_on == "all":
            return packed.weights
        known = batch["prefix"][:, 1:]  # the target of the token before
        if self.document_mask:
            known &= packed.positions[:, 1:] > 0  # that of a document's last token is none of the next one's prefix
        return packed.weights * ~jnp.pad(known, ((0, 0), (0, 1)))

    def seen(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"prefix": batch["prefix"]}
