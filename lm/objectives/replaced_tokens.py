"""Replaced-token detection (ELECTRA: Clark et al., 2020, section 2): masked words, filled in by sampling from a small
model that learns to predict them, and for every token of the result the question whether it is the original.

The host masks; the words are drawn within the step, from the generator's own softmax, with noise that depends on the
example alone. So they are the same on any number of devices, in any microbatch and at any place in the batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lm.errors import UserError
from lm.models import MaskedLMAndReplaced, Task
from lm.nn.dropout import split_key
from lm.objectives import noise
from lm.objectives.base import Loss, Predictions
from lm.objectives.cross_entropy import HeadFn, cross_entropy
from lm.objectives.masked_lm import MaskedLM
from lm.objectives.words import WordBoundaries as WordTable
from lm.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplacedTokens(MaskedLM):
    """Examples as `MaskedLM` makes them, without a pair. The loss of a target is

        -log p_generator(target) + detector_weight * (mean over the row's tokens of the binary cross entropy)

    summed over targets, so that dividing by their number gives the paper's mean + 50 mean where rows are alike. Both
    means are over what is not padding, [CLS] and [SEP] included in the second. `Loss.nll` is the generator's alone, so
    (loss - nll) / detector_weight of the metrics is the discriminator's loss (with z_loss 0). An evaluation's score is
    that of the generator, as of any `MaskedLM`: the nll of the masked tokens and their bytes.

    mask_share: of the predicted tokens the authors' code shows 85 % as the mask and the others as they are
        (google-research/electra, pretrain/pretrain_helpers.py: mask); the paper's text has 1.0.
    detector_weight: lambda of the paper's eq. 5.
    chunks: see `cross_entropy`; as many for the logits that are sampled from.

    A token that is drawn and happens to be the original is no replacement (section 2). No gradient goes through the
    draw: the generator learns from its own loss alone, the embedding that both share from both.
    """

    mask_share: float = 0.85
    random_share: float = 0.0
    detector_weight: float = 50.0

    def __post_init__(self):
        super().__post_init__()
        if self.pair != "none":
            raise UserError(
                f"objective.pair: expected 'none' for ReplacedTokens, got {self.pair!r}; take MaskedLM, which trains it"
            )
        if self.detector_weight < 0.0:
            raise UserError(
                f"objective.detector_weight: expected 0 or more, got {self.detector_weight}; ELECTRA has 50"
            )

    @property
    def tasks(self) -> tuple[type[Task], ...]:
        return (MaskedLMAndReplaced,)

    def features(self, batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The features of `MaskedLM`, and noise uint32 [B,2], the key from which a row's words are drawn."""
        return super().features(batch_size, seq_len) | {"noise": jax.ShapeDtypeStruct((batch_size, 2), jnp.uint32)}

    def examples(self, rows: dict[str, np.ndarray], words: WordTable | None = None) -> dict[str, np.ndarray]:
        bits = noise.draw(self.noise_seed, "replaced_tokens/sample", rows["id"], 1)
        # JAX's keys are two uint32; it has no uint64 by default.
        halves = np.concatenate([bits >> np.uint64(32), bits & np.uint64(2**32 - 1)], axis=1)
        return super().examples(rows, words) | {"noise": halves.astype(np.uint32)}

    def loss(self, model: Any, batch: dict[str, jax.Array], *, dtype: DTypeLike, key: jax.Array | None) -> Loss:
        tokens, at, targets, weights = (batch[k] for k in ("tokens", "positions", "targets", "weights"))
        valid = tokens != self.pad_id
        k_generator, k_discriminator = split_key(key, 2)
        predictions, _ = self.predictions(model, batch, dtype=dtype, key=k_generator)
        x = predictions.hidden
        head, params = model.head_fn()
        total, nll = cross_entropy(head, params, *predictions, self.z_loss, 0.0, self.chunks)

        drawn = sample(head, *jax.lax.stop_gradient((params, x)), batch["noise"], self.chunks)
        original = filled(tokens, at, targets, weights)
        shown = filled(tokens, at, drawn, weights)
        logits = model.replaced(model(shown, dtype=dtype, valid=valid, key=k_discriminator).hidden)
        # Binary cross entropy of log-odds, which cannot overflow.
        wrong = jax.nn.softplus(logits) - jnp.where(shown != original, logits, 0.0)
        # A row may be padding alone.
        of_row = jnp.sum(jnp.where(valid, wrong, 0.0), axis=1) / jnp.maximum(jnp.sum(valid, axis=1), 1)
        total += self.detector_weight * jnp.sum(of_row * jnp.sum(weights, axis=1))
        return Loss(total, nll, jnp.sum(weights))

    def predictions(
        self, model: Any, batch: dict[str, jax.Array], *, dtype: DTypeLike, key: jax.Array | None
    ) -> tuple[Predictions, jax.Array]:
        """The predictions of the generator, and its hidden states."""
        tokens = batch["tokens"]
        hidden = model.generate(tokens, dtype=dtype, valid=tokens != self.pad_id, key=key).hidden
        x = constrain(jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1), "act_batch", None, None)
        return Predictions(x, batch["targets"], batch["weights"]), hidden


def sample(head: HeadFn, params: Any, x: jax.Array, seeds: jax.Array, chunks: int = 1) -> jax.Array:
    """x [B,P,G], seeds uint32 [B,2] -> int32 [B,P], a word from the softmax of each place's logits.

    The largest of logits + Gumbel noise is such a draw (Maddison et al., 2014). The noise of a word depends on its
    row's seed, its place among the P and its id, whatever `chunks` there are, which divide P.
    """
    b, n, _ = x.shape

    def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, places = part
        logits = head(params, x)
        return jnp.argmax(logits + gumbel(seeds, places, logits.shape[-1]), axis=-1).astype(jnp.int32)

    places = jnp.arange(n)
    if chunks == 1:
        return one((x, places))
    # Cut as `cross_entropy` cuts: a strided chunk leaves each row on its device.
    cut = jnp.moveaxis(x.reshape(b, n // chunks, chunks, -1), 2, 0)
    return jnp.moveaxis(jax.lax.map(one, (cut, places.reshape(-1, chunks).T)), 0, 2).reshape(b, n)


def gumbel(seeds: jax.Array, places: jax.Array, vocab: int) -> jax.Array:
    """seeds uint32 [B,2], places int32 [C] -> float32 [B,C,V] of the standard Gumbel distribution."""

    def of_place(key: jax.Array, place: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(key, place), (vocab,), jnp.float32)

    # Threefry by name: the bits of another generator that a host may have set as its default depend on vmap.
    keys = jax.random.wrap_key_data(seeds, impl="threefry2x32")
    draws = jax.vmap(jax.vmap(of_place, in_axes=(None, 0)), in_axes=(0, None))(keys, places)
    return constrain(draws, "act_batch", None, "act_vocab")


def filled(tokens: jax.Array, at: jax.Array, words: jax.Array, weights: jax.Array) -> jax.Array:
    """tokens [B,S] with `words` [B,P] at the places `at` [B,P] that have a weight."""
    places = jnp.where(weights > 0, at, tokens.shape[1])  # beyond the end, and dropped
    return jax.vmap(lambda row, place, word: row.at[place].set(word, mode="drop"))(tokens, places, words)
