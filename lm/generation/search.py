"""Greedy and beam search over any model, with the conventions of `transformers.generate` 5.23.

The model is a function, its cache a tree; neither is looked into. Nothing is drawn here: see `lm.generation.sampling`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import UserError, did_you_mean
from lm.generation.processors import Search, process

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
Rules = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# What `transformers` adds to a score to put it last: float32 sums with it lose the score, which leaves ties.
LAST = np.float32(-1e9)


class Found(NamedTuple):
    """sequences int32 [B*R,P+N], R = num_return_sequences best first; scores float32 [B*R]; lengths int32 [B*R].

    scores: in beam search, sum of the processed log-probabilities / length ** length_penalty; in greedy search, the sum
        of the log-softmax of the processed logits.
    lengths: generated tokens, the end token included. After them come pad tokens; but in beam search, where
        pad_token_id is 0, the first end token, as in `transformers`.
    """

    sequences: jax.Array
    scores: jax.Array
    lengths: jax.Array


def search(
    step: Step,
    cache: Any,
    ids: jax.Array,
    logits: jax.Array,
    s: Search,
    *,
    encoder_ids: jax.Array | None = None,
    prompt_mask: jax.Array | None = None,
) -> Found:
    """ids int32 [B,P], logits [B,V] after the last of them, every leaf of cache [B,...] -> what is likeliest.

    step(tokens int32 [R], n int32 [], cache) -> (logits [R,V], cache): tokens are the n-th generated ones, which stand
    at position P+n-1; R is B*num_beams, the beams of a prompt side by side. The cache is repeated and reordered here.
    prompt_mask bool [B,P]: False before the prompt of a row that is padded on the left (for the repetition penalty).
    encoder_ids int32 [B,S]: what the encoder read, or the prompt where there is no encoder.

    Call it under `jax.jit`, whose arguments include what `step` closes over: it traces `step` into one while_loop.
    Equal scores go to the earlier beam, then to the lower id; in `transformers` their order is torch.topk's, undefined.
    UserError where shapes disagree, or an option needs what is not given.
    """
    _check(cache, ids, logits, s, encoder_ids, prompt_mask)
    start = None if prompt_mask is None else jnp.argmax(prompt_mask, axis=1)
    if s.num_beams > 1:
        repeat = functools.partial(jnp.repeat, repeats=s.num_beams, axis=0)
        cache, logits, start, encoder_ids = jax.tree.map(repeat, (cache, logits, start, encoder_ids))
    rules = functools.partial(process, s=s, prompt_len=ids.shape[1], prompt_start=start, encoder_ids=encoder_ids)
    return (_greedy if s.num_beams == 1 else _beam_search)(step, cache, ids.astype(jnp.int32), logits, rules, s)


def trim(found: Found, prompt_len: int) -> np.ndarray:
    """The sequences on the host, cut after the longest of them, as `transformers` returns them."""
    return np.asarray(found.sequences)[:, : prompt_len + int(np.max(np.asarray(found.lengths)))]


def _check(cache: Any, ids: Any, logits: Any, s: Search, encoder_ids: Any, prompt_mask: Any) -> None:
    def expect(ok: bool, name: str, what: str, got: object) -> None:
        if not ok:
            raise UserError(f"search.{name}: expected {what}, got {got}")

    expect(ids.ndim == 2 and ids.shape[1] > 0, "ids", "[batch, prompt] with a prompt token", list(ids.shape))
    rows = ids.shape[0]
    expect(logits.ndim == 2 and logits.shape[0] == rows, "logits", f"[{rows}, vocabulary]", list(logits.shape))
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
        ok = jnp.ndim(leaf) > 0 and leaf.shape[0] == rows
        name = f"cache{jax.tree_util.keystr(path)}"
        expect(ok, name, f"a leading batch axis of size {rows}; let `step` close over what has none", jnp.shape(leaf))
    if prompt_mask is not None:
        expect(prompt_mask.shape == ids.shape, "prompt_mask", f"{list(ids.shape)} as ids", list(prompt_mask.shape))
    for name in ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"):
        on = getattr(s, name) != Search.__dataclass_fields__[name].default
        expect(encoder_ids is not None or not on, "encoder_ids", f"the encoder's (or prompt's) ids for {name}", None)
    if encoder_ids is not None:
        ok = encoder_ids.ndim == 2 and encoder_ids.shape[0] == rows
        expect(ok, "encoder_ids", f"[{rows}, length]", list(encoder_ids.shape))
    s.check_vocab(logits.shape[1])
    if s.num_beams > 1:
        # So that num_beams candidates stay open should all end tokens of every beam be among them.
        fits = _candidates(s) <= s.num_beams * logits.shape[1]
        expect(fits, "logits", f"a vocabulary of more than {_candidates(s) // s.num_beams - 1} ids", logits.shape[1])


def _candidates(s: Search) -> int:
    return max(2, 1 + len(s.eos_token_id)) * s.num_beams


def _ends(tokens: jax.Array, s: Search) -> jax.Array:
    return jnp.isin(tokens, np.array(s.eos_token_id, np.int32))


class _Row(NamedTuple):
    """Greedy search after n tokens: ids [B,P+N], and per row the sum of log-probabilities, the tokens, and its end."""

    n: jax.Array
    ids: jax.Array
    score: jax.Array
    length: jax.Array
    ended: jax.Array


def _greedy(step: Step, cache: Any, ids: jax.Array, logits: jax.Array, rules: Rules, s: Search) -> Found:
    rows, prompt_len = ids.shape

    def choose(r: _Row, logits: jax.Array) -> _Row:
        scores = rules(logits.astype(jnp.float32), r.ids, r.n)
        tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), tokens[:, None], axis=-1)[:, 0]
        tokens = jnp.where(r.ended, s.pad_token_id, tokens)
        return _Row(
            n=r.n + 1,
            ids=r.ids.at[:, prompt_len + r.n].set(tokens),
            score=r.score + jnp.where(r.ended, 0.0, log_probs),
            length=r.length + ~r.ended,
            ended=r.ended | _ends(tokens, s),
        )

    def go_on(carry: tuple[_Row, Any]) -> jax.Array:
        return (carry[0].n < s.max_new_tokens) & ~jnp.all(carry[0].ended)

    def advance(carry: tuple[_Row, Any]) -> tuple[_Row, Any]:
        r, cache = carry
        logits, cache = step(r.ids[:, prompt_len + r.n - 1], r.n, cache)
        return choose(r, logits), cache

    ids = jnp.pad(ids, ((0, 0), (0, s.max_new_tokens)), constant_values=s.pad_token_id)
    row = _Row(jnp.int32(0), ids, jnp.zeros(rows, jnp.float32), jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool))
    row, _ = jax.lax.while_loop(go_on, advance, (choose(row, logits), cache))
    return Found(row.ids, row.score, row.length)


class _Beams(NamedTuple):
    """Beam search after n tokens, with K beams a prompt.

    Open beams, best first: `open_ids` [B,K,P+N], `open_scores` [B,K] (sums of log-probabilities), and `parents` [B*K],
    the rows of the cache that they continue. Kept ones, best first: `ids`, `scores` (over the length's penalty),
    `lengths`, and whether they are `finished` or only hold a place. `improvable` [B,1]: an open beam may yet do better.
    """

    n: jax.Array
    open_ids: jax.Array
    open_scores: jax.Array
    parents: jax.Array
    ids: jax.Array
    scores: jax.Array
    lengths: jax.Array
    finished: jax.Array
    improvable: jax.Array
    stop: jax.Array


def _pick(index: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """index [B,K] into axis 1 of every array [B,C,...]."""
    return [jnp.take_along_axis(a, index.reshape(*index.shape, *[1] * (a.ndim - 2)), axis=1) for a in arrays]


def _beam_search(step: Step, cache: Any, ids: jax.Array, logits: jax.Array, rules: Rules, s: Search) -> Found:
    (batch, prompt_len), vocab_size = ids.shape, logits.shape[1]
    beams, new, eager = s.num_beams, s.max_new_tokens, s.early_stopping is True
    norm = jnp.asarray(np.maximum(np.arange(new + 1.0), 1.0) ** s.length_penalty, jnp.float32)

    def choose(b: _Beams, logits: jax.Array) -> _Beams:
        log_probs = rules(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), b.open_ids.reshape(-1, total), b.n)
        sums = log_probs.reshape(batch, beams, vocab_size) + b.open_scores[:, :, None]
        top, index = jax.lax.top_k(sums.reshape(batch, -1), _candidates(s))
        parent, token = index // vocab_size, index % vocab_size
        (grown,) = _pick(parent, b.open_ids)
        grown = grown.at[:, :, prompt_len + b.n].set(token)
        n = b.n + 1
        ends = _ends(token, s) | (n >= new)

        still_open = top + ends * LAST
        open_ids, open_scores, parents = _pick(jax.lax.top_k(still_open, beams)[1], grown, still_open, parent)

        # A candidate below the first `beams` is there to go on with, and may not finish.
        finishes = ends & (jnp.arange(top.shape[1]) < beams)
        full = jnp.all(b.finished, axis=1, keepdims=True) & eager
        scores = top / norm[n] + full * LAST + ~b.improvable * LAST + ~finishes * LAST
        lengths = jnp.full(top.shape, n)
        merged = jax.tree.map(
            lambda kept, more: jnp.concatenate((kept, more), axis=1),
            (b.scores, b.ids, b.lengths, b.finished),
            (scores, grown, lengths, finishes),
        )
        scores, ids, lengths, finished = _pick(jax.lax.top_k(merged[0], beams)[1], *merged)

        hoped = norm[new] if s.early_stopping == "never" and s.length_penalty > 0.0 else norm[n]
        worst = jnp.where(finished, jnp.min(scores, axis=1, keepdims=True), LAST)
        improvable = b.improvable & jnp.any(open_scores[:, :1] / hoped > worst, axis=1, keepdims=True)
        stop = ~jnp.any(improvable) | (jnp.all(finished) & eager) | jnp.all(ends)
        rows = (parents + jnp.arange(batch)[:, None] * beams).reshape(-1)
        return _Beams(n, open_ids, open_scores, rows, ids, scores, lengths, finished, improvable, stop)

    def advance(carry: tuple[_Beams, Any]) -> tuple[_Beams, Any]:
        b, cache = carry
        cache = jax.tree.map(lambda leaf: leaf[b.parents], cache)
        logits, cache = step(b.open_ids[:, :, prompt_len + b.n - 1].reshape(-1), b.n, cache)
        return choose(b, logits), cache

    # transformers: `pad_token_id or eos_token_id[0]`, so that a pad token 0 counts as none.
    fill = s.pad_token_id or next(iter(s.eos_token_id), 0)
    padded = jnp.pad(ids, ((0, 0), (0, new)), constant_values=fill)
    total = padded.shape[1]
    padded = jnp.broadcast_to(padded[:, None], (batch, beams, total))
    # One beam to start from, for else all would grow alike.
    first = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, LAST), (batch, beams))
    none = jnp.zeros((batch, beams), bool)
    b = _Beams(
        n=jnp.int32(0),
        open_ids=padded,
        open_scores=first,
        parents=jnp.arange(batch * beams),
        ids=padded,
        scores=jnp.full((batch, beams), LAST),
        lengths=jnp.zeros((batch, beams), jnp.int32),
        finished=none,
        improvable=jnp.ones((batch, 1), bool),
        stop=jnp.bool_(False),
    )
    b, _ = jax.lax.while_loop(lambda carry: ~carry[0].stop, advance, (choose(b, logits), cache))
    best = s.num_return_sequences
    return Found(b.ids[:, :best].reshape(-1, total), b.scores[:, :best].reshape(-1), b.lengths[:, :best].reshape(-1))


# Of transformers' names: those that only a draw looks at, and those that ask for another algorithm. Each with the
# values under which it does nothing; None is always one.
_SAMPLING: dict[str, tuple[object, ...]] = {
    "temperature": (1.0,),
    "top_k": (0, 50),
    "top_p": (1.0,),
    "min_p": (),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
}
_OTHER: dict[str, tuple[object, ...]] = {
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "use_mtp": (False,),
    "stop_strings": (),
    "max_time": (),
    "watermarking_config": (),
    "token_healing": (False,),
}
# The names under which old configs have the number of positions.
_POSITIONS = {"n_positions": {"codegen", "ctrl", "gpt2", "gpt_bigcode", "gptj", "openai-gpt"}, "max_seq_len": {"dbrx"}}


def generation_defaults(
    config: dict[str, Any], generation_config: dict[str, Any] | None, *, prompt_len: int, **kwargs: Any
) -> Search:
    """config.json and generation_config.json of a model, and arguments of `generate` -> what `generate` would do.

    The arguments come first, then generation_config.json, and only where there is none the old fields of config.json
    and of its text part; then the defaults of `transformers`, among them 20 new tokens, as far as the positions go.
    max_length and min_length count prompt_len, that of the decoder; max_new_tokens and min_new_tokens win over them.

    UserError for an unknown argument, for do_sample=True, and for what a search cannot do.
    """
    names = set(Search.__dataclass_fields__) | {"max_length", "do_sample", *_SAMPLING, *_OTHER}
    for name, value in kwargs.items():
        if name not in names:
            raise UserError(f"generate.{name}: expected an argument of a search, got none{did_you_mean(name, names)}")
        if name in _SAMPLING and value is not None and value not in _SAMPLING[name]:
            raise UserError(f"generate.{name}: expected nothing in a search, got {value!r}; use lm.generation.Sampling")
    given = {**(_legacy(config) if generation_config is None else generation_config), **kwargs}
    given = {name: value for name, value in given.items() if name in names and value is not None}
    if given.pop("do_sample", False):
        raise UserError(
            "generate.do_sample: expected False in a search, got True; pass do_sample=False, or use "
            "lm.generation.Sampling, which draws"
        )
    for name, neutral in _OTHER.items():
        if name in given and given[name] not in neutral:
            raise UserError(f"generate.{name}: expected none in a search, got {given[name]!r}; pass {name}=None")
    given = {name: value for name, value in given.items() if name not in {*_SAMPLING, *_OTHER}}

    max_length = given.pop("max_length", None)
    if "max_new_tokens" not in given:
        if max_length is None:
            max_length = min(20 + prompt_len, _positions(config))
        if max_length <= prompt_len:
            raise UserError(f"generate.max_length: expected more than the prompt's {prompt_len}, got {max_length}")
        given["max_new_tokens"] = max_length - prompt_len
    if "min_new_tokens" in given:
        given["min_length"] = 0
    eos = given.get("eos_token_id", ())
    given["eos_token_id"] = (eos,) if isinstance(eos, int) else tuple(eos)
    # Without an end token no row is shorter than another, and nothing is padded.
    given.setdefault("pad_token_id", next(iter(given["eos_token_id"]), 0))
    return Search(**{name: _frozen(value) for name, value in given.items()})


def _legacy(config: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in config.items() if value is not None}
    text: dict[str, Any] = next(
        (config[name] for name in ("decoder", "generator", "text_config") if config.get(name)), {}
    )
    given = {**text, **given}
    if given.get("force_bos_token_to_be_generated"):
        given["forced_bos_token_id"] = given.get("bos_token_id")
    return given


def _positions(config: dict[str, Any]) -> float:
    for name, kinds in _POSITIONS.items():
        if config.get("model_type") in kinds and name in config:
            return config[name]
    return config.get("max_position_embeddings") or float("inf")


def _frozen(value: Any) -> Any:
    value = list(value.items()) if isinstance(value, dict) else value
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
