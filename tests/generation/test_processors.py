import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UserError
from lm.generation.processors import Search, process, repeats, seen, sequence_bias

R, T, V, P, N, S = 5, 11, 17, 4, 7, 6
RNG = np.random.default_rng(0)
SCORES = (RNG.normal(size=(R, V)) * 2).astype(np.float32)
# Few different ids, so that n-grams come again. Past the n-th generated token stands what must not be read.
IDS = RNG.integers(0, 4, (R, T)).astype(np.int32)
ENCODED = RNG.integers(0, 4, (R, S)).astype(np.int32)
START = np.array([0, 1, 2, 3, 0])


def settings(**kwargs) -> Search:
    return Search(**{"max_new_tokens": N, "pad_token_id": 0, "eos_token_id": (2, 9), **kwargs})


def processed(n: int, s: Search, *, scores=SCORES, prompt_len=P, start=START):
    """The ids past those that count are set to one that stands in every word of the tests."""
    ids = np.where(np.arange(T) < prompt_len + n, IDS, 3)
    run = lambda scores, ids, n: process(
        scores, ids, n, s, prompt_len=prompt_len, prompt_start=jnp.asarray(start), encoder_ids=jnp.asarray(ENCODED)
    )
    return np.asarray(jax.jit(run)(scores, ids, jnp.int32(n)))


def banned(scores) -> list[set[int]]:
    return [set(np.flatnonzero(np.isneginf(row)).tolist()) for row in scores]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [0, 1, 6])
def test_no_ngram_comes_twice_and_every_other_token_may_come(size, n):
    for option, source in (("no_repeat_ngram_size", IDS[:, : P + n]), ("encoder_no_repeat_ngram_size", ENCODED)):
        want = []
        for i, row in enumerate(IDS[:, : P + n].tolist()):
            there = source[i].tolist()
            grams = {tuple(there[j : j + size]) for j in range(len(there) - size + 1)}
            want.append({v for v in range(V) if len(row) >= size - 1 and (*row[len(row) - size + 1 :], v) in grams})
        got = processed(n, settings(**{option: size}))
        assert banned(got) == want
        np.testing.assert_array_equal(got[np.isfinite(got)], SCORES[np.isfinite(got)])


def test_words_are_biased_where_their_beginning_was_just_written():
    pair, three = tuple(IDS[1, :2].tolist()), tuple(IDS[2, 2:5].tolist())
    words = {(3,): 1.5, (1, 3): -math.inf, (0, 3): 0.25, (*pair, 3): 2.0, (*three, 5): -1.0, (*[1] * 9, 4): 9.0}
    met = set()
    for length in (1, 2, 5, 10):
        want = np.zeros((R, V), np.float32)
        for i, row in enumerate(IDS[:, :length].tolist()):
            for word, bias in words.items():
                if len(word) == 1 or (len(word) <= length + 1 and row[-(len(word) - 1) :] == list(word[:-1])):
                    want[i, word[-1]] += bias
                    met.add(word)
        np.testing.assert_array_equal(sequence_bias(jnp.asarray(IDS), jnp.int32(length), words, V), want)
    assert met == set(words) - {(*[1] * 9, 4)}


def test_ids_that_no_logit_stands_for_are_overlooked():
    ids = jnp.array([[3, -100, 25, 1, 5]])
    counts = jnp.array([[True, True, True, True, False]])
    assert np.flatnonzero(seen(ids, counts, V)[0]).tolist() == [1, 3]
    again = repeats(jnp.array([[7, 25, 7, 4]]), jnp.array([[7]]), jnp.int32(1), 2, V, jnp.int32(4))
    assert np.flatnonzero(again[0]).tolist() == [4]


def test_forced_tokens_are_the_only_ones_at_their_places():
    only = lambda n, s, prompt_len=P: [
        set(np.flatnonzero(np.isfinite(row))) for row in processed(n, s, prompt_len=prompt_len)
    ]
    last = settings(forced_eos_token_id=(2, 9))
    assert only(N - 1, last) == [{2, 9}] * R and (processed(N - 1, last)[:, [2, 9]] == 0).all()
    assert only(N - 2, last) == [set(range(V))] * R
    first = settings(forced_bos_token_id=7)
    assert only(0, first, prompt_len=1) == [{7}] * R
    assert only(1, first, prompt_len=1) == only(0, first) == [set(range(V))] * R


def test_end_tokens_are_held_back_by_both_lengths():
    for s, free in ((settings(min_new_tokens=3), 3), (settings(min_length=P + 2), 2)):
        assert banned(processed(free - 1, s)) == [{2, 9}] * R
        assert banned(processed(free, s)) == [set()] * R


@pytest.fixture(scope="module")
def model():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    config = transformers.GPT2Config(vocab_size=V, n_embd=4, n_layer=1, n_head=1, n_positions=T)
    return transformers.GPT2LMHeadModel(config)


# One at a time, and some whose order matters, under transformers' names.
CASES = [
    dict(repetition_penalty=1.7),
    dict(encoder_repetition_penalty=1.7),
    dict(no_repeat_ngram_size=2),
    dict(encoder_no_repeat_ngram_size=2),
    dict(bad_words_ids=[[2], [3], [1, 3], [0, 2, 5]]),
    dict(sequence_bias=[[[3], 1.5], [[1, 3], -2.0], [[0, 2, 5], 0.5]]),
    dict(min_length=P + 3),
    dict(min_new_tokens=3),
    dict(forced_bos_token_id=3, begin_suppress_tokens=[4, 5]),
    dict(forced_eos_token_id=[2, 9], exponential_decay_length_penalty=(1, 1.3)),
    dict(suppress_tokens=[4, 9], begin_suppress_tokens=[5, 6], renormalize_logits=True),
    dict(exponential_decay_length_penalty=(1, 1.3), min_new_tokens=4, renormalize_logits=True),
    dict(remove_invalid_values=True, suppress_tokens=[4], no_repeat_ngram_size=1),
    dict(repetition_penalty=1.4, encoder_repetition_penalty=0.6, sequence_bias=[[[3], 4.5]], bad_words_ids=[[1, 1]]),
]


@pytest.mark.hf
@pytest.mark.parametrize("kwargs", CASES, ids=str)
def test_scores_are_those_of_transformers(model, kwargs):
    import torch
    from transformers import GenerationConfig

    freeze = lambda x: tuple(map(freeze, x)) if isinstance(x, list | tuple) else x
    ours = settings(**{name: freeze(value) for name, value in kwargs.items()})
    scores = SCORES.copy()
    scores[0, 1], scores[1, 2], scores[2, 6] = -np.inf, -np.inf, -1e9
    if ours.remove_invalid_values:
        scores[3, 7], scores[4, 8] = np.nan, np.inf
    for prompt_len in (P, 1):
        start = np.minimum(START, prompt_len - 1)
        mask = torch.from_numpy((np.arange(prompt_len) >= start[:, None]).astype(int))
        config = GenerationConfig(max_length=prompt_len + N, **kwargs)
        config._eos_token_tensor = torch.tensor(ours.eos_token_id)
        theirs = model._get_logits_processor(
            config,
            input_ids_seq_length=prompt_len,
            encoder_input_ids=torch.from_numpy(ENCODED.astype(np.int64)),
            device="cpu",
            model_kwargs={"attention_mask": mask},
        )
        for n in (0, 1, 2, N - 1):
            ids = torch.from_numpy(IDS[:, : prompt_len + n].astype(np.int64))
            want = theirs(ids, torch.from_numpy(scores.copy())).numpy()
            got = processed(n, ours, scores=scores, prompt_len=prompt_len, start=start)
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6, err_msg=f"prompt {prompt_len}, n {n}")


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(num_beams=0), "generate.num_beams: expected at least 1, got 0"),
        (dict(num_beams=2.0), "generate.num_beams: expected at least 1, got 2.0"),
        (dict(max_new_tokens=0), "generate.max_new_tokens"),
        (dict(num_return_sequences=2), "num_return_sequences: expected at most generate.num_beams=1, got 2"),
        (dict(early_stopping="always"), "generate.early_stopping: expected True, False or 'never', got 'always'"),
        (dict(length_penalty=float("nan")), "generate.length_penalty"),
        (dict(repetition_penalty=0.0), "generate.repetition_penalty: expected a positive number"),
        (dict(no_repeat_ngram_size=-1), "generate.no_repeat_ngram_size"),
        (dict(eos_token_id=5), "generate.eos_token_id: expected a tuple of token ids, got 5"),
        (dict(pad_token_id=-1), "generate.pad_token_id: expected a token id, got -1"),
        (dict(bad_words_ids=((),)), "generate.bad_words_ids: expected a tuple of tuples"),
        (dict(sequence_bias=(((), 1.0),)), "generate.sequence_bias"),
        (dict(forced_eos_token_id=2, suppress_tokens=(2, 3)), "generate.forced_eos_token_id: .*then none is left"),
        (dict(exponential_decay_length_penalty=(1, 1.1), eos_token_id=()), "with an eos_token_id"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(UserError, match=message):
        settings(**bad)
