"""Fill in the middle: next-token prediction over documents whose middle was moved to their end.

A document p m s, cut at two of its places, is read as prefix-suffix-middle [PRE] p [SUF] s [MID] m eos or as
suffix-prefix-middle [PRE] [SUF] s [MID] p m eos, the form for training on both. The eos that ends any document ends
the middle. Places lie between tokens: the paper cuts between characters, which a store of tokens no longer has.

It is done on the documents, and parts of documents, that a row holds (the paper's context level). Each becomes 3 tokens
longer, so the end of the row gives way: padding first, then its last tokens. Nothing else is lost.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError
from lm.objectives import noise
from lm.objectives.causal_lm import CausalLM, Packed

SENTINELS = ("prefix_id", "suffix_id", "middle_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillInTheMiddle(CausalLM):
    """Bavarian et al., 2022, "Efficient training of language models to fill in the middle", section 3.

    prefix_id, suffix_id, middle_id: ids that the tokenizer never makes of text.
    rate: share of the documents that are changed. spm_share: of those, the share in suffix-prefix-middle form.
    sentinel_loss: whether the sentinels count as targets. Without them a loss is not the length of a text in bits.
    """

    prefix_id: int
    suffix_id: int
    middle_id: int
    rate: float = 0.5
    spm_share: float = 0.5
    sentinel_loss: bool = True
    noise_seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        ids = (self.pad_id, self.start_id, *self._sentinels)
        if len(set(ids)) < len(ids) or min(ids[1:]) < 0:  # a tokenizer without padding has NO_PAD
            raise UserError(
                "objective: expected different ids of 0 and more for pad_id, start_id, prefix_id, suffix_id and "
                f"middle_id, got {', '.join(map(str, ids))}; make model.vocab_size larger than the tokenizer's size"
            )
        for name in ("rate", "spm_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"objective.{name}: expected a share from 0 to 1, got {getattr(self, name)}")

    @property
    def _sentinels(self) -> tuple[int, int, int]:
        return self.prefix_id, self.suffix_id, self.middle_id

    @property
    def unit(self) -> str:
        return "token" if self.sentinel_loss else "token of text"

    def examples(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens = noise.closed(rows["tokens"], self.pad_id, self.start_id)
        self._check_text(tokens)
        n, width = tokens.shape
        real = tokens != self.pad_id
        stop = np.where(real.any(axis=1), width - real[:, ::-1].argmax(axis=1), 0)
        row, end, begin, ordinal = _documents(tokens == self.start_id)
        ends_here = end < width
        end = np.minimum(end, np.where(ends_here, width, stop[row]))  # the last part of a row ends before its padding
        length = end - begin
        # A longer draw begins with the shorter: a document's bits do not depend on the others of the batch.
        bits = noise.draw(self.noise_seed, "fim", rows["id"], 4 * (ordinal.max() + 1)).reshape(n, -1, 4)[row, ordinal]
        changed = (noise.uniform(bits[:, 0]) < self.rate) & (length > 0)
        spm = noise.uniform(bits[:, 1]) < self.spm_share
        cuts = (noise.uniform(bits[:, 2:]) * (length + 1)[:, None]).astype(np.int64)  # both ends are places too
        first, second = begin + cuts.min(axis=1), begin + cuts.max(axis=1)

        # Every document is written as 7 runs of its row, which the sentinels follow from column `width` on.
        form = np.where(changed, 1 + spm, 0)
        run = lambda *of_forms: [np.broadcast_to(np.choose(form, x), form.shape) for x in zip(*of_forms, strict=True)]
        nothing, pre, suf, mid = (begin, begin), (width, width + 1), (width + 1, width + 2), (width + 2, width + 3)
        prefix, middle, suffix = (begin, first), (first, second), (second, end)
        runs = [
            run(nothing, pre, pre),
            run((begin, end), prefix, suf),
            run(nothing, suf, suffix),
            run(nothing, suffix, mid),
            run(nothing, mid, (begin, second)),
            run(nothing, middle, nothing),
            [end, end + ends_here],
        ]
        source = np.hstack([tokens, np.broadcast_to(np.array(self._sentinels, tokens.dtype), (n, 3))])
        return {"tokens": _written(source, row, np.array(runs).transpose(2, 1, 0), width, self.pad_id)}

    def weights(self, batch: dict[str, jax.Array], packed: Packed) -> jax.Array:
        if self.sentinel_loss:
            return packed.weights
        return packed.weights * ~jnp.isin(packed.targets, jnp.array(self._sentinels))

    def _check_text(self, tokens: np.ndarray) -> None:
        for name, value in zip(SENTINELS, self._sentinels, strict=True):
            if (tokens == value).any():
                raise UserError(
                    f"objective.{name}: expected an id that the tokenizer never makes of text, got {value}, which the "
                    "corpus has; set one of the tokenizer's size or more"
                )


def _documents(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ends bool [n,W] -> of each document or part of one: its row, where it ends (W: with the row), where it begins,
    and how many in its row come before it, int64 [d]."""
    n, width = ends.shape
    row, end = np.nonzero(np.hstack([ends, np.ones((n, 1), bool)]))
    ordinal = np.arange(len(row)) - np.searchsorted(row, row)
    begin = np.where(ordinal == 0, 0, np.concatenate([[0], end[:-1] + 1]))
    return row, end, begin, ordinal


def _written(source: np.ndarray, row: np.ndarray, runs: np.ndarray, width: int, pad_id: int) -> np.ndarray:
    """The runs [d,2,r] of columns (from, to) of source[row [d]], one after another, as rows of `width`: the rest of
    those that are longer is left out, and those that are shorter are padded."""
    starts, lengths = runs[:, 0].reshape(-1), (runs[:, 1] - runs[:, 0]).reshape(-1)
    of_run = np.repeat(np.repeat(row, runs.shape[2]), lengths)
    before = np.cumsum(lengths) - lengths
    index = np.arange(len(of_run))
    column = index + np.repeat(starts - before, lengths)
    at = index - np.searchsorted(of_run, np.arange(len(source)))[of_run]
    kept = at < width
    out = np.full((len(source), width), pad_id, np.int32)
    out[of_run[kept], at[kept]] = source[of_run[kept], column[kept]]
    return out
