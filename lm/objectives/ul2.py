"""UL2's mixture of denoisers: every row is corrupted by one of several settings, and says in its first token of which
mode that is.

A denoiser is span corruption with settings of its own. R (regular) has short spans and little noise, X (extreme) long
spans or much noise, S (sequential) one span at the end of the row: a prefix to go on from. Rows of all denoisers have
the same text, data.seq_len tokens, so their inputs and targets differ in length: they are padded to the longest, and
`UL2.padding` says how much of a batch that is. For a decoder see `lm.objectives.ul2_decoder`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lm.errors import UserError
from lm.models import Architecture
from lm.objectives import noise
from lm.objectives.base import Loss, Objective, Score, SpecialToken
from lm.objectives.span_corruption import SpanCorruption, with_sentinels

Mode = Literal["R", "S", "X"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
    """One setting. mean_span None: a single span, the end of the row. weight: its part of the rows, of the sum."""

    mode: Mode
    noise_density: float
    mean_span: float | None = None
    weight: float = 1.0

    def __post_init__(self):
        if not 0.0 < self.noise_density < 1.0:
            raise UserError(
                f"objective.denoisers: expected a noise_density between 0 and 1, got {self.noise_density} ({self.mode})"
            )
        if self.mean_span is not None and self.mean_span < 1.0:
            raise UserError(
                f"objective.denoisers: expected a mean_span of at least 1 token, or None, got {self.mean_span} "
                f"({self.mode})"
            )
        if self.weight <= 0.0:
            raise UserError(f"objective.denoisers: expected a weight above 0, got {self.weight} ({self.mode})")


# Tay et al., 2022, table 1: seven denoisers, of which S has a fifth of the rows and the others alike.
PAPER = (
    Denoiser(mode="R", noise_density=0.15, mean_span=3.0, weight=2.0),
    Denoiser(mode="R", noise_density=0.15, mean_span=8.0, weight=2.0),
    Denoiser(mode="S", noise_density=0.25, weight=3.0),
    Denoiser(mode="X", noise_density=0.5, mean_span=3.0, weight=2.0),
    Denoiser(mode="X", noise_density=0.5, mean_span=8.0, weight=2.0),
    Denoiser(mode="X", noise_density=0.15, mean_span=64.0, weight=2.0),
    Denoiser(mode="X", noise_density=0.5, mean_span=64.0, weight=2.0),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UL2(Objective):
    """Tay et al., 2022, "UL2: Unifying language learning paradigms", section 3. Inputs are [mode] and those of
    `SpanCorruption`, which also has the meaning of the fields with its names; targets are its own.

    r_id, s_id, x_id: the tokens of the modes, which the tokenizer never makes of text.
    denoisers: those of the paper by default.
    chunks: see `cross_entropy`; divides the longest targets.
    """

    family: ClassVar[Architecture] = "encoder_decoder"

    first_sentinel_id: int
    r_id: int
    s_id: int
    x_id: int
    n_sentinels: int = 100
    denoisers: tuple[Denoiser, ...] = PAPER
    noise_seed: int = 0
    z_loss: float = 0.0
    chunks: int = 1

    def __post_init__(self):
        if not self.denoisers:
            raise UserError("objective.denoisers: expected at least one, got (); leave it out for those of the paper")
        self._corruption(self.denoisers[0], 2)  # refuses what is wrong in the fields that they share
        ids = (self.pad_id, self.start_id, self.r_id, self.s_id, self.x_id)
        last = self.first_sentinel_id - self.n_sentinels + 1
        lowest = min(self.decoder_start_id, *ids[1:])  # a decoder may have NO_PAD
        if len(set(ids)) < len(ids) or lowest < 0 or any(last <= i <= self.first_sentinel_id for i in ids):
            raise UserError(
                "objective: expected different ids of 0 and more, none of them a sentinel, for pad_id, start_id, r_id, "
                f"s_id and x_id, got {', '.join(map(str, ids))} and sentinels {last} to {self.first_sentinel_id}"
            )

    def special_tokens(self) -> tuple[SpecialToken, ...]:
        return with_sentinels(super().special_tokens(), self.n_sentinels)

    @property
    def decoder_start_id(self) -> int:
        return self.pad_id

    @property
    def shares(self) -> np.ndarray:
        """float64 [denoisers]: the share of the rows that each has."""
        weights = np.array([d.weight for d in self.denoisers])
        return weights / weights.sum()

    def lengths(self, seq_len: int) -> np.ndarray:
        """int64 [denoisers,2]: tokens of inputs, the mode included, and of targets, for rows of `seq_len` of text."""
        each = (self._corruption(d, seq_len).lengths(seq_len) for d in self.denoisers)
        return np.array([(1 + own.inputs, own.targets) for own in each])

    def padding(self, seq_len: int) -> float:
        """The share of the slots of a batch that are padding, in the mean over rows."""
        own, slots = self.lengths(seq_len), self._slots(seq_len)
        return float(1.0 - self.shares @ own.sum(axis=1) / slots)

    def longest(self, seq_len: int) -> int:
        return int(self.lengths(seq_len).max())

    def check(self, seq_len: int) -> None:
        self._check_denoisers(seq_len)
        most = int(self.lengths(seq_len)[:, 1].max())
        if most % self.chunks:
            raise UserError(
                f"objective.chunks: {self.chunks} does not divide the {most} targets of data.seq_len {seq_len}"
            )

    def features(self, batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        """inputs and targets, of the longest of `lengths(seq_len)`, padded."""
        n_inputs, n_targets = self.lengths(seq_len).max(axis=0).tolist()
        return {
            "inputs": jax.ShapeDtypeStruct((batch_size, n_inputs), jnp.int32),
            "targets": jax.ShapeDtypeStruct((batch_size, n_targets), jnp.int32),
        }

    def denoiser_of(self, ids: np.ndarray) -> np.ndarray:
        """ids int64 [n] of examples -> int64 [n]: which of `denoisers` each has."""
        u = noise.uniform(noise.draw(self.noise_seed, "ul2/denoiser", ids, 1))[:, 0]
        return np.searchsorted(np.cumsum(self.shares)[:-1], u, side="right")

    def examples(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens, ids = rows["tokens"], rows["id"]
        seq_len = tokens.shape[1] - 1
        # Not those of a subclass, which `UL2Decoder` makes of these.
        out = {k: np.full(f.shape, self.pad_id, f.dtype) for k, f in UL2.features(self, len(ids), seq_len).items()}
        chosen = self.denoiser_of(ids)
        for i, denoiser in enumerate(self.denoisers):
            which = np.flatnonzero(chosen == i)
            if len(which):
                own = self._corruption(denoiser, seq_len).examples({"tokens": tokens[which], "id": ids[which]})
                # A row of padding alone stays one.
                mode = np.where(own["inputs"][:, 0] == self.pad_id, self.pad_id, self._mode_id(denoiser.mode))
                out["inputs"][which, 0] = mode
                out["inputs"][which, 1 : 1 + own["inputs"].shape[1]] = own["inputs"]
                out["targets"][which, : own["targets"].shape[1]] = own["targets"]
        return out

    def loss(self, model: Any, batch: dict[str, jax.Array], *, dtype: DTypeLike, key: jax.Array | None) -> Loss:
        # Any of them: the loss is the same.
        return self._corruption(self.denoisers[0], 2).loss(model, batch, dtype=dtype, key=key)

    def score(self, model: Any, batch: dict[str, jax.Array], token_bytes: jax.Array, *, dtype: DTypeLike) -> Score:
        """Scores the targets of every denoiser together, sentinels and eos included, which stand for no bytes."""
        return self._corruption(self.denoisers[0], 2).score(model, batch, token_bytes, dtype=dtype)

    def _corruption(self, denoiser: Denoiser, seq_len: int) -> SpanCorruption:
        """The span corruption of a denoiser: a mean as long as the row makes a single span, which is the row's end."""
        return SpanCorruption(
            first_sentinel_id=self.first_sentinel_id,
            n_sentinels=self.n_sentinels,
            noise_density=denoiser.noise_density,
            mean_span=float(seq_len) if denoiser.mean_span is None else denoiser.mean_span,
            noise_seed=self.noise_seed,
            z_loss=self.z_loss,
            chunks=self.chunks,
            start_id=self.start_id,
            pad_id=self.pad_id,
        )

    def _check_denoisers(self, seq_len: int) -> None:
        for denoiser in self.denoisers:
            # Chunks divide the longest targets alone.
            dataclasses.replace(self._corruption(denoiser, seq_len), chunks=1).check(seq_len)

    def _mode_id(self, mode: Mode) -> int:
        return {"R": self.r_id, "S": self.s_id, "X": self.x_id}[mode]

    def _slots(self, seq_len: int) -> int:
        return int(self.lengths(seq_len).max(axis=0).sum())
