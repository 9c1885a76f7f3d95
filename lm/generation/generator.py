"""Prompts in, completions out: batching, the end of a text, and streaming. What runs on the device is in `decode`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lm.errors import UserError
from lm.generation.decode import Decode
from lm.generation.sampling import Sampling, knobs
from lm.models import Model

MIN_BUCKET = 16  # slots; below it a longer row costs less than another compile
INCOMPLETE = "\ufffd"  # what a decoder writes for a character whose bytes are still to come


class Tokenizer(Protocol):
    """`decode` of the first ids of a text is the start of its `decode`, but for an incomplete last character."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Generator:
    """Completes prompts with `model`, whose documents open with `start_id` and end with `end_id` (None: the same): one
    precedes each prompt, the other ends each text. start_id None: nothing precedes, as `encode` sees to it.

    A row's result depends on its prompt, the sampling settings and, unless greedy, its place in the call; not on the
    other rows or on padding (up to rounding). `pad_id` and ids outside the tokenizer are never drawn.

    batch_size: rows decoded at once; their cache takes 2 L T G K numbers of `dtype` for each row.
    chunk: tokens between two looks of the host, for streaming and stop strings; no result depends on it.
    """

    def __init__(
        self,
        model: Model,
        params: dict,
        tokenizer: Tokenizer,
        *,
        start_id: int | None,
        pad_id: int,
        end_id: int | None = None,
        dtype: DTypeLike = jnp.float32,
        batch_size: int = 32,
        chunk: int = 8,
    ):
        end_id = start_id if end_id is None else end_id
        if end_id is None:
            raise UserError("generate.end_id: expected an id where start_id is None, got None; pass it")
        self.start = () if start_id is None else (start_id,)
        ids_by_name = (*(("start_id", i) for i in self.start), ("pad_id", pad_id), ("end_id", end_id))
        for name, value in ids_by_name:
            if not 0 <= value < model.vocab_size:
                raise UserError(
                    f"generate.{name}: expected an id below model.vocab_size {model.vocab_size}, got {value}; "
                    "use the tokenizer that the model was trained with"
                )
        if tokenizer.vocab_size > model.vocab_size:
            raise UserError(
                f"generate.tokenizer: expected at most model.vocab_size {model.vocab_size} ids, got "
                f"{tokenizer.vocab_size}; use the tokenizer that the model was trained with"
            )
        for name, value in (("batch_size", batch_size), ("chunk", chunk)):
            if value < 1:
                raise UserError(f"generate.{name}: expected at least 1, got {value}")
        ids = np.arange(model.vocab_size)
        never = ((ids >= tokenizer.vocab_size) | (ids == pad_id)) & (ids != end_id)
        self.model, self.tokenizer, self.end_id = model, tokenizer, end_id
        self.batch_size, self.chunk = batch_size, chunk
        self._decode = Decode(model, params, never, end_id, dtype)

    def __call__(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """The text that follows each prompt. Prompts may be empty."""
        if isinstance(prompts, str):
            raise UserError("generate.prompts: expected a list of strings, got one string; write [prompt]")
        encoded = [self.tokenizer.encode(p) for p in prompts]
        rows = self.tokens(encoded, sampling)
        return [_cut(self._text(prompt, ids), sampling.stop) for prompt, ids in zip(encoded, rows, strict=True)]

    def tokens(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """The ids that follow each prompt: up to `end_id`, or through the token that completes a stop string."""
        for i, prompt in enumerate(prompts):
            self._check(i, prompt, sampling)
        chunk = self.chunk if sampling.stop else sampling.max_new_tokens
        out: list[list[int]] = []
        for first in range(0, len(prompts), self.batch_size):
            *_, rows = self._run(prompts[first : first + self.batch_size], first, sampling, chunk)
            out += rows
        return out

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Pieces that join to `self([prompt], sampling)[0]`: whole characters, and nothing of a stop string."""
        ids = self.tokenizer.encode(prompt)
        self._check(0, ids, sampling)
        return self._stream(ids, sampling)

    def _stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[str]:
        shown, text = 0, ""
        for (ids,) in self._run([prompt], 0, sampling, self.chunk):
            text = _cut(self._text(prompt, ids), sampling.stop)
            safe = _without_stop_start(text.rstrip(INCOMPLETE), sampling.stop)
            if len(safe) > shown:
                yield safe[shown:]
                shown = len(safe)
        if len(text) > shown:
            yield text[shown:]

    def _run(
        self, prompts: Sequence[Sequence[int]], first: int, sampling: Sampling, chunk: int
    ) -> Iterator[list[list[int]]]:
        """Yields the new ids of all rows so far, after the first token and then after each chunk."""
        n, limit, k = len(prompts), sampling.max_new_tokens, knobs(sampling)
        b, p = _bucket(n, 1), _bucket(len(self.start) + max(map(len, prompts)))
        tokens, lengths = np.full((b, p), self.end_id, np.int32), np.zeros(b, np.int32)
        for i, prompt in enumerate(prompts):
            lengths[i] = len(self.start) + len(prompt)
            tokens[i, p - lengths[i] :] = (*self.start, *prompt)
        rows = np.arange(first, first + b, dtype=np.int32)
        state = self._decode.start(tokens, lengths, rows, sampling.seed, k, new=_bucket(limit))
        drawn, halt = 1, np.zeros(b, bool)
        ids: list[list[int]] = [[] for _ in prompts]
        # Without stop strings there is nothing to look at after the first token, if the next chunk is also the last.
        if 1 < limit <= 1 + chunk and not sampling.stop:
            state, drawn = self._decode.go_on(state, limit, halt, k), limit
        while True:
            done, out = np.array(state.done), np.array(state.out)
            for i in range(n):
                if halt[i]:
                    continue
                checked, ids[i] = len(ids[i]), _until(out[i, :drawn].tolist(), self.end_id)
                end = self._stop_end(prompts[i], ids[i], checked, sampling.stop)
                if end is not None:
                    ids[i], halt[i] = ids[i][:end], True
            yield [list(row) for row in ids]
            if drawn >= limit or (done | halt)[:n].all():
                return
            drawn = min(drawn + chunk, limit)
            state = self._decode.go_on(state, drawn, halt, k)

    def _text(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """What `ids` add to a prompt: alone they would lose the space that some tokenizers drop before a text."""
        return self.tokenizer.decode([*prompt, *ids])[len(self.tokenizer.decode(prompt)) :]

    def _stop_end(self, prompt: Sequence[int], ids: list[int], checked: int, stop: tuple[str, ...]) -> int | None:
        """The number of ids that complete a stop string first, when the first `checked` do not."""

        def found(n: int) -> bool:
            text = self._text(prompt, ids[:n]).rstrip(INCOMPLETE)
            return any(s in text for s in stop)

        if not stop or not found(len(ids)):
            return None
        return next(n for n in range(checked + 1, len(ids) + 1) if found(n))

    def _check(self, i: int, prompt: Sequence[int], sampling: Sampling) -> None:
        v, longest = self.model.vocab_size, self.model.max_seq_len
        bad = [x for x in prompt if not 0 <= x < v]
        if bad:
            raise UserError(
                f"generate.prompts[{i}]: expected ids below model.vocab_size {v}, got {bad[0]}; "
                "use the tokenizer that the model was trained with"
            )
        n = len(self.start) + len(prompt)
        if not n:
            raise UserError(f"generate.prompts[{i}]: expected a token, got none; this model has no start token")
        room = None if longest is None else longest - n
        if room is not None and room < sampling.max_new_tokens:
            way_out = f"set generate.max_new_tokens<={room} or shorten it" if room > 0 else "shorten the prompt"
            raise UserError(
                f"generate.prompts[{i}]: expected at most {longest} tokens (model.max_seq_len), got {n} "
                f"with the start token and {sampling.max_new_tokens} new ones; {way_out}"
            )


def _bucket(n: int, least: int = MIN_BUCKET) -> int:
    """The next power of two, so that few shapes are compiled."""
    return max(least, 1 << (n - 1).bit_length())


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _cut(text: str, stop: tuple[str, ...]) -> str:
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def _without_stop_start(text: str, stop: tuple[str, ...]) -> str:
    """`text` less a last part that the next characters could turn into a stop string."""
    held = (n for s in stop for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n]))
    return text[: len(text) - max(held, default=0)]
