"""Prompts in, text out: batching, the end of a text, and streaming. What runs on the device is in `engine`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lm.errors import UserError
from lm.generation.cached import Given, cached
from lm.generation.engine import Engine
from lm.generation.processors import Search
from lm.generation.sampling import Draws, Sample, Sampling, knobs
from lm.generation.search import Beams, BeamSearch, Greedy, searching
from lm.models import Model

MIN_BUCKET = 16  # slots; below it a longer row costs less than another compile
INCOMPLETE = "\ufffd"  # what a decoder writes for a character whose bytes are still to come


class Tokenizer(Protocol):
    """`decode` of the first ids of a text is the start of its `decode`, but for an incomplete last character."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Call(NamedTuple):
    """How a call is generated. start: what precedes the new tokens beside the prompt; rows: prompts at once; new: slots
    for new tokens."""

    strategy: Sample | Greedy | Beams
    start: tuple[int, ...]
    rows: int
    new: int


class Generator:
    """Writes text with `model`: a decoder continues a prompt, an encoder-decoder reads it.

    A row's result depends on its prompt, the settings and, where it is drawn, its place in the call; not on the other
    rows or on padding (up to rounding). `pad_id` and ids outside the tokenizer are never drawn.

    start_id: precedes the prompt of a decoder, or what an encoder-decoder writes; None: nothing, `encode` sees to it.
    end_id: any of these ids ends a text; None: `start_id`.
    search: what a search does beside the settings of a call (of an imported folder, see `lm.generation.defaults`); it
        then also takes the place of drawing at temperature 0.
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
        end_id: int | tuple[int, ...] | None = None,
        search: Search | None = None,
        dtype: DTypeLike = jnp.float32,
        batch_size: int = 32,
        chunk: int = 8,
    ):
        end_id = start_id if end_id is None else end_id
        if end_id is None:
            raise UserError("generate.end_id: expected an id where start_id is None, got None; pass it")
        self.end_ids = end_id if isinstance(end_id, tuple) else (end_id,)
        self.start = () if start_id is None else (start_id,)
        self.reads = model.family == "encoder_decoder"
        named = {"start_id": self.start, "pad_id": (pad_id,), "end_id": self.end_ids}
        for name, value in ((name, i) for name, ids in named.items() for i in ids):
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
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.chunk = batch_size, chunk
        ids = np.arange(model.vocab_size)
        never = ((ids >= tokenizer.vocab_size) | (ids == pad_id)) & ~np.isin(ids, self.end_ids)
        self._sample = Sample(self.end_ids, never)
        self._folder = search is not None
        base = search or Search(max_new_tokens=1, pad_token_id=self.end_ids[0], eos_token_id=self.end_ids)
        never_ids = tuple(np.flatnonzero(never).tolist())
        self._search = dataclasses.replace(base, suppress_tokens=(*base.suppress_tokens, *never_ids))
        self._engine = Engine(cached(model, dtype))
        self._params = self._engine.split(params)

    def __call__(self, prompts: Sequence[str], how: Sampling | BeamSearch) -> list[str]:
        """The text that follows each prompt, or that an encoder-decoder makes of it. Prompts may be empty."""
        if isinstance(prompts, str):
            raise UserError("generate.prompts: expected a list of strings, got one string; write [prompt]")
        encoded = [self.tokenizer.encode(p) for p in prompts]
        rows = self.tokens(encoded, how)
        return [_cut(self._text(prompt, ids), how.stop) for prompt, ids in zip(encoded, rows, strict=True)]

    def tokens(self, prompts: Sequence[Sequence[int]], how: Sampling | BeamSearch) -> list[list[int]]:
        """The ids that follow each prompt: up to an end, or through the token that completes a stop string."""
        for i, prompt in enumerate(prompts):
            self._check(i, prompt, how)
        call = self._call(how)
        chunk = self.chunk if how.stop else how.max_new_tokens
        out: list[list[int]] = []
        for first in range(0, len(prompts), call.rows):
            *_, rows = self._run(prompts[first : first + call.rows], first, how, call, chunk)
            out += rows
        return out

    def stream(self, prompt: str, how: Sampling | BeamSearch) -> Iterator[str]:
        """Pieces that join to `self([prompt], how)[0]`: whole characters, and nothing of a stop string. Beams give all
        of the text at the end."""
        ids = self.tokenizer.encode(prompt)
        self._check(0, ids, how)
        return self._stream(ids, how)

    def _stream(self, prompt: Sequence[int], how: Sampling | BeamSearch) -> Iterator[str]:
        shown, text = 0, ""
        for (ids,) in self._run([prompt], 0, how, self._call(how), self.chunk):
            text = _cut(self._text(prompt, ids), how.stop)
            safe = _without_stop_start(text.rstrip(INCOMPLETE), how.stop)
            if len(safe) > shown:
                yield safe[shown:]
                shown = len(safe)
        if len(text) > shown:
            yield text[shown:]

    def _call(self, how: Sampling | BeamSearch) -> Call:
        limit = how.max_new_tokens
        if isinstance(how, Sampling) and (how.temperature > 0 or not self._folder):
            # The first token that a folder forces is as good as given.
            forced = (self._search.forced_bos_token_id,) if self.reads else ()
            start = (*self.start, *(i for i in forced if i is not None))
            return Call(self._sample, start, self.batch_size, _bucket(limit))
        if isinstance(how, Sampling):
            penalty = None if how.repetition_penalty == 1.0 else how.repetition_penalty
            how = BeamSearch(max_new_tokens=limit, beams=1, repetition_penalty=penalty)
        return Call(searching(how.settings(self._search)), self.start, max(1, self.batch_size // how.beams), limit)

    def _given(self, prompts: Sequence[Sequence[int]], call: Call) -> Given:
        """Rounds the shapes up. A row that only fills the batch is not valid, or is the last prompt again where the
        strategy can ignore none. A decoder's prompts are right-aligned, an encoder's inputs left-aligned."""
        start = () if self.reads else call.start
        texts = [(*start, *prompt) for prompt in prompts]
        b, s = _bucket(len(texts), 1), _bucket(max(map(len, texts)))
        if isinstance(call.strategy, Beams):
            texts += [texts[-1]] * (b - len(texts))
        source = np.full((b, s), -1, np.int32)
        for row, text in zip(source, texts, strict=False):
            at = slice(0, len(text)) if self.reads else slice(s - len(text), s)
            row[at] = text
        valid, first = source >= 0, np.zeros(b, np.int32)
        read = np.where(valid, source, self.end_ids[0]).astype(np.int32)  # any id there is: it is not attended to
        prompts_of = np.tile(np.array(call.start, np.int32), (b, 1)) if self.reads else source
        return Given(read, valid, prompts_of, source, first)

    def _run(
        self, prompts: Sequence[Sequence[int]], first: int, how: Sampling | BeamSearch, call: Call, chunk: int
    ) -> Iterator[list[list[int]]]:
        """Yields the new ids of all rows so far, after the first token and after each chunk; of beams at the end."""
        n, limit, strategy = len(prompts), how.max_new_tokens, call.strategy
        given, settings = self._given(prompts, call), None
        b = len(given.read)
        if isinstance(how, Sampling) and isinstance(strategy, Sample):
            settings = Draws(np.uint32(how.seed), np.arange(first, first + b, dtype=np.int32), knobs(how))
        state = self._engine.start(self._params, given, settings, strategy=strategy, new=call.new)
        drawn, halt = 1, np.zeros(b, bool)
        ids: list[list[int]] = [[] for _ in prompts]
        # Without stop strings there is nothing to look at after the first token, if the next chunk is also the last.
        if isinstance(strategy, Beams) or (1 < limit <= 1 + chunk and not how.stop):
            state, drawn = self._engine.advance(self._params, state, np.int32(limit), halt), limit
        while True:
            out, done = strategy.look(state.choice)
            for i in range(n):
                if halt[i]:
                    continue
                checked, ids[i] = len(ids[i]), _until(out[i, :drawn].tolist(), self.end_ids)
                end = self._stop_end(prompts[i], ids[i], checked, how.stop)
                if end is not None:
                    ids[i], halt[i] = ids[i][:end], True
            yield [list(row) for row in ids]
            if drawn >= limit or (done | halt)[:n].all():
                return
            drawn = min(drawn + chunk, limit)
            state = self._engine.advance(self._params, state, np.int32(drawn), halt)

    def _text(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """What `ids` add to a prompt: alone they would lose the space that some tokenizers drop before a text. What an
        encoder-decoder writes begins anew."""
        if self.reads:
            return self.tokenizer.decode(ids)
        return self.tokenizer.decode([*prompt, *ids])[len(self.tokenizer.decode(prompt)) :]

    def _stop_end(self, prompt: Sequence[int], ids: list[int], checked: int, stop: tuple[str, ...]) -> int | None:
        """The number of ids that complete a stop string first, when the first `checked` do not."""

        def found(n: int) -> bool:
            text = self._text(prompt, ids[:n]).rstrip(INCOMPLETE)
            return any(s in text for s in stop)

        if not stop or not found(len(ids)):
            return None
        return next(n for n in range(checked + 1, len(ids) + 1) if found(n))

    def _check(self, i: int, prompt: Sequence[int], how: Sampling | BeamSearch) -> None:
        v, longest, new = self.model.vocab_size, self.model.max_seq_len, how.max_new_tokens
        bad = [x for x in prompt if not 0 <= x < v]
        if bad:
            raise UserError(
                f"generate.prompts[{i}]: expected ids below model.vocab_size {v}, got {bad[0]}; "
                "use the tokenizer that the model was trained with"
            )
        n = len(prompt) if self.reads else len(self.start) + len(prompt)
        if not n:
            raise UserError(f"generate.prompts[{i}]: expected a token, got none; this model has no start token")
        if longest is None:
            return
        if self.reads:
            if n > longest:
                raise UserError(
                    f"generate.prompts[{i}]: expected at most {longest} tokens (model.max_seq_len), got {n}; shorten it"
                )
            if new > longest:
                raise UserError(f"generate.max_new_tokens: expected at most model.max_seq_len {longest}, got {new}")
        elif (room := longest - n) < new:
            way_out = f"set generate.max_new_tokens<={room} or shorten it" if room > 0 else "shorten the prompt"
            raise UserError(
                f"generate.prompts[{i}]: expected at most {longest} tokens (model.max_seq_len), got {n} "
                f"with the start token and {new} new ones; {way_out}"
            )


def _bucket(n: int, least: int = MIN_BUCKET) -> int:
    """The next power of two, so that few shapes are compiled."""
    return max(least, 1 << (n - 1).bit_length())  # less than twice the slots that are needed


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((n for n, i in enumerate(ids) if i in ends), len(ids))]


def _cut(text: str, stop: tuple[str, ...]) -> str:
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def _without_stop_start(text: str, stop: tuple[str, ...]) -> str:
    """`text` less a last part that the next characters could turn into a stop string."""
    held = (n for s in stop for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n]))
    return text[: len(text) - max(held, default=0)]
