import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.errors import UserError
from lm.generation import BeamSearch, Generator, Sampling
from lm.generation.cached import CachedDecoder, Given
from lm.generation.engine import Engine
from lm.generation.processors import Search
from lm.generation.sampling import Draws, Sample, knobs
from lm.generation.search import searching
from lm.models import GPT2, T5, Llama
from lm.models.base import abstract, init
from tests.halves import slow_but

START, PAD = 256, 257  # ids 0..255 are bytes, 258 is a spare special, 259 on are padding of the vocabulary
MODELS = {
    "gpt2": GPT2(vocab_size=263, d_model=28, n_layers=3, n_heads=7, max_positions=59, init_std=0.3),
    "llama": Llama(vocab_size=263, d_model=26, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=10, d_ff=37, init_std=0.3),
}
GREEDY = Sampling(max_new_tokens=13, temperature=0.0)
SAMPLED = Sampling(max_new_tokens=13, temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.2, seed=3)
PROMPTS = [[104, 105], [], [7] * 19, [1, 2, 3, 4, 5], [200, 100, 50, 25]]


class Bytes:
    """Ids are UTF-8 bytes; specials are silent."""

    vocab_size = 259

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


@functools.cache
def params_of(name):
    """Biases and scales too are random, so that one left out shows."""
    leaves, treedef = jax.tree.flatten(init(MODELS[name], jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return treedef.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


@functools.cache
def generator(name="gpt2", **kwargs):
    return Generator(MODELS[name], params_of(name), Bytes(), start_id=START, pad_id=PAD, **kwargs)


@functools.cache
def full_forward(name):
    graphdef = abstract(MODELS[name]).graphdef

    def logits(params, tokens):
        module = nnx.merge(graphdef, params)
        return module.logits(module(tokens, dtype=jnp.float32)[0])[0]

    return jax.jit(logits)


class Script:
    """Stands in for `Engine`: a device that says `text` whatever it is asked."""

    def __init__(self, text):
        self.ids = list(text.encode())

    def start(self, params, given, settings, *, strategy, new):
        out = np.array([(self.ids + [START] * new)[:new]] * len(given.read))
        return SimpleNamespace(choice=SimpleNamespace(out=out, done=np.zeros(len(out), bool)))

    def advance(self, params, state, until, halt):
        out = state.choice.out
        return SimpleNamespace(choice=SimpleNamespace(out=out, done=(out[:, :until] == START).any(1)))


def scripted(text, monkeypatch, chunk=8):
    g = generator()
    monkeypatch.setattr(g, "_engine", Script(text))
    monkeypatch.setattr(g, "chunk", chunk)
    return g


@pytest.mark.parametrize("name", slow_but(["llama"], MODELS))
def test_cached_greedy_is_argmax_of_the_full_forward(name):
    never = np.isin(np.arange(263), [PAD, 259, 260, 261, 262])
    for prompt, got in zip(PROMPTS, generator(name).tokens(PROMPTS, GREEDY)):
        ids, want = [START, *prompt], []
        while len(want) < GREEDY.max_new_tokens:
            padded = np.array([ids + [0] * (40 - len(ids))])  # causal: what follows changes nothing
            scores = np.where(never, -np.inf, full_forward(name)(params_of(name), padded)[len(ids) - 1])
            if (token := int(scores.argmax())) == START:
                break
            want.append(token)
            ids.append(token)
        assert got == want


class Recorded(Sample):
    """Keeps the logits that tokens are drawn from."""

    logits = []

    def choose(self, drawn, logits):
        jax.debug.callback(lambda x: self.logits.append(x), logits, ordered=True)
        return super().choose(drawn, logits)


def given(tokens, lengths):
    """Prompts of a decoder, right-aligned."""
    valid = np.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
    prompts = np.where(valid, tokens, -1)
    return Given(tokens, valid, prompts, prompts, np.zeros(len(tokens), np.int32))


@pytest.mark.parametrize("name", slow_but(["gpt2"], MODELS))
def test_cached_logits_equal_the_full_forward(name):
    engine, strategy = Engine(CachedDecoder(MODELS[name], jnp.float32)), Recorded((START,), np.zeros(263, bool))
    strategy.logits.clear()
    params = engine.split(params_of(name))
    prompt = [START, 104, 105, 33]
    tokens = np.array([[0] * 12 + prompt, [0] * 15 + [START]], np.int32)
    draws = Draws(np.uint32(0), np.arange(2), knobs(SAMPLED))
    state = engine.start(params, given(tokens, np.array([4, 1])), draws, strategy=strategy, new=16)
    state = engine.advance(params, state, 6)
    jax.effects_barrier()
    for row, ids in enumerate((prompt, [START])):
        ids = ids + np.asarray(state.choice.out)[row, :6].tolist()
        want = full_forward(name)(params_of(name), np.array([ids]))
        got = np.stack([x[row] for x in strategy.logits])
        np.testing.assert_allclose(got, want[len(ids) - 7 : -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", slow_but(["llama"], MODELS))
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_depends_on_no_other_row_and_on_no_padding(name, sampling, monkeypatch):
    """5 rows in 8 of 32 slots, against one row at a time in 16 or 32 slots."""
    g = generator(name)
    together = g.tokens(PROMPTS, sampling)
    assert len(set(map(tuple, together))) == len(PROMPTS)
    assert g.tokens([[1], *PROMPTS[1:]], sampling)[1:] == together[1:]
    monkeypatch.setattr(g, "batch_size", 1)
    assert g.tokens(PROMPTS, sampling) == together


READER = T5(vocab_size=263, d_model=26, n_layers=2, n_heads=3, head_dim=10, d_ff=37)
# What counts tokens or looks at those before: of a prompt alone, whatever it is padded with.
RULES = Search(
    max_new_tokens=1,
    pad_token_id=START,
    eos_token_id=(START, 9),
    min_length=9,
    repetition_penalty=1.3,
    no_repeat_ngram_size=2,
    encoder_repetition_penalty=1.2,
    encoder_no_repeat_ngram_size=2,
    forced_bos_token_id=33,
    begin_suppress_tokens=(4,),
)


@pytest.mark.parametrize("case", slow_but(["llama, 3 beams"], ["llama", "llama, 3 beams", "t5", "t5, 3 beams"]))
def test_what_a_search_finds_depends_on_no_other_row_and_on_no_padding(case):
    model, beams = READER if "t5" in case else MODELS["llama"], 3 if "beams" in case else 1
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, init(model, jax.random.key(4)))
    g = Generator(model, params, Bytes(), start_id=START, pad_id=PAD, end_id=(START, 9), search=RULES)
    prompts = [[5], [7] * 17, [1, 2, 3, 1, 2], [200, 100]]
    how = BeamSearch(max_new_tokens=11, beams=beams)
    together = g.tokens(prompts, how)
    strategy, engine, own = searching(how.settings(g._search)), g._engine, g._params
    for prompt, got in list(zip(prompts, together))[::2]:
        read = np.array([prompt if model is READER else [START, *prompt]], np.int32)
        first = np.array([[START]], np.int32) if model is READER else read
        alone = Given(read, np.ones_like(read, bool), first, read, np.zeros(1, np.int32))
        state = engine.start(own, alone, None, strategy=strategy, new=11)
        found = strategy.found(engine.advance(own, state, 11).choice)
        want = found.sequences[0, first.shape[1] :][: found.lengths[0]].tolist()
        assert got == want[: next((n for n, i in enumerate(want) if i in (START, 9)), 11)]
    assert len(set(map(tuple, together))) > 1
    if model is READER:
        assert all(ids[0] == 33 for ids in together)  # forced as the second token of what the decoder has


def test_greedy_search_and_temperature_0_find_the_same_and_stream_alike():
    g = generator("llama")
    assert g.tokens(PROMPTS, BeamSearch(max_new_tokens=13, beams=1)) == g.tokens(PROMPTS, GREEDY)
    for beams in (1, 2):
        how = BeamSearch(max_new_tokens=13, beams=beams)
        (text,) = g(["hé"], how)
        assert "".join(g.stream("hé", how)) == text
        at = len(text) // 2
        stopped = dataclasses.replace(how, stop=(text[at : at + 2],))
        assert g(["hé"], stopped) == ["".join(g.stream("hé", stopped))] == [text[: text.find(text[at : at + 2])]]


def test_an_encoder_decoder_draws_by_row_and_reads_what_is_given():
    g = Generator(READER, init(READER, jax.random.key(4)), Bytes(), start_id=START, pad_id=PAD, chunk=3)
    rows = g.tokens([[5, 6]] * 3, SAMPLED)
    assert len(set(map(tuple, rows))) == 3
    assert g.tokens([[5, 6]], SAMPLED) == rows[:1] != g.tokens([[5, 7]], SAMPLED)
    assert "".join(g.stream("hé", SAMPLED)) == g(["hé"], SAMPLED)[0]
    with pytest.raises(UserError, match=r"prompts\[0\]: expected a token, got none"):
        g.tokens([[]], SAMPLED)


def test_equal_prompts_differ_by_row_and_seed_and_repeat_by_call():
    g = generator()
    rows = g.tokens([[5, 6]] * 3, SAMPLED)
    assert len(set(map(tuple, rows))) == 3
    assert g.tokens([[5, 6]] * 3, SAMPLED) == rows
    assert g.tokens([[5, 6]], dataclasses.replace(SAMPLED, seed=4)) != rows[:1]


def test_changing_settings_compiles_nothing():
    g = Generator(MODELS["gpt2"], params_of("gpt2"), Bytes(), start_id=START, pad_id=PAD)
    for sampling in (GREEDY, SAMPLED, Sampling(max_new_tokens=9, min_p=0.1, seed=8, stop=("xyz",))):
        g.tokens([[1, 2], [3]], sampling)
        g.tokens([[1, 2, 3, 4], []], sampling)
    assert g._engine.start._cache_size() == g._engine.advance._cache_size() == 1


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_chunks_and_streams_change_nothing(sampling, monkeypatch):
    sampling = dataclasses.replace(sampling, stop=("\x00\x01nowhere",))
    g = generator()
    (want,) = g(["hé"], sampling)
    for chunk in (1, 3, 5, 100):
        monkeypatch.setattr(g, "chunk", chunk)
        assert g(["hé"], sampling) == [want]
        assert "".join(g.stream("hé", sampling)) == want
        assert "".join(g.stream("hé", dataclasses.replace(sampling, stop=()))) == want


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(
    "text, stop, want",
    [
        ("one two three", (" tw",), "one"),  # spans tokens and chunks
        ("one two three", ("x", "three"), "one two "),
        ("one two three", ("twx", "wo t", "ee"), "one t"),
        ("xabcd", ("b", "abc"), "xa"),  # 'b' is complete first, however many tokens a chunk has
        ("stop at once", ("s",), ""),
        ("né😀e", ("😀",), "né"),
        ("never", ("rx",), "never"),
        ("né😀", (), "né😀"),
    ],
)
def test_text_ends_before_the_stop_string_completed_first(text, stop, want, chunk, monkeypatch):
    g = scripted(text, monkeypatch, chunk)
    sampling = Sampling(max_new_tokens=17, stop=stop)
    assert g(["p", "q"], sampling) == [want, want]
    pieces = list(g.stream("p", sampling))
    assert "".join(pieces) == want and all(pieces) and not any("\ufffd" in p for p in pieces)


def test_tokens_end_with_the_one_that_completes_a_stop_string(monkeypatch):
    assert scripted("abcdef", monkeypatch).tokens([[]], Sampling(max_new_tokens=9, stop=("cd",))) == [list(b"abcd")]


def test_a_last_incomplete_character_is_not_lost(monkeypatch):
    g = scripted("aé", monkeypatch)
    sampling = Sampling(max_new_tokens=2)
    assert g(["p"], sampling) == ["a\ufffd"] == ["".join(g.stream("p", sampling))]


def _always(name, *ids, pad_id=PAD):
    """A model that gives equal and highest scores to `ids`."""
    params = jax.tree.map(jnp.zeros_like, params_of(name))
    params["norm"]["bias"] = jnp.ones_like(params["norm"]["bias"])
    params["embed"]["table"] = params["embed"]["table"].at[jnp.array(ids)].set(1.0)
    return Generator(MODELS[name], params, Bytes(), start_id=START, pad_id=pad_id)


def test_the_loop_ends_when_all_rows_have():
    g = _always("gpt2", START)
    assert g.tokens([[1], [2, 3], []], GREEDY) == [[], [], []]
    assert list(g.stream("abc", GREEDY)) == []
    engine, params, strategy = generator()._engine, generator()._params, generator()._sample
    prompts = given(np.full((4, 16), START, np.int32), np.array([1, 1, 1, 0], np.int32))
    draws = Draws(np.uint32(0), np.arange(4), knobs(SAMPLED))
    state = engine.start(params, prompts, draws, strategy=strategy, new=16)
    state = engine.advance(params, state, 3, np.zeros(4, bool))
    assert state.choice.n == 3 and not np.asarray(state.choice.done)[:3].any()
    state = engine.advance(params, state, 16, np.array([1, 1, 1, 0], bool))
    assert state.choice.n == 3 and np.asarray(state.choice.done).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_pad_and_ids_outside_the_tokenizer_are_never_drawn(temperature):
    g = _always("gpt2", PAD, 260, 262, 65)
    assert g.tokens([[1]], Sampling(max_new_tokens=6, temperature=temperature, top_k=1)) == [[65] * 6]


def test_pad_that_is_also_the_start_token_still_ends_a_text():
    assert _always("gpt2", START, pad_id=START).tokens([[1]], GREEDY) == [[]]


def test_sharded_parameters_give_the_same_tokens():
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    params = jax.tree.map(put, params_of("llama"))
    attn = params["layers"]["attn"]
    attn["q"] = put(attn["q"], None, None, "tensor")
    params["layers"]["mlp"]["down"] = put(params["layers"]["mlp"]["down"], None, None, "tensor")
    g = Generator(MODELS["llama"], params, Bytes(), start_id=START, pad_id=PAD)
    assert g.tokens(PROMPTS[:2], SAMPLED) == generator("llama").tokens(PROMPTS[:2], SAMPLED)


def test_bad_input_is_refused():
    g = generator()
    assert g([], GREEDY) == g.tokens([], GREEDY) == []
    with pytest.raises(UserError, match=r"expected a list of strings, got one string; write \[prompt\]"):
        g("abc", GREEDY)
    with pytest.raises(UserError, match=r"prompts\[1\]: expected ids below model.vocab_size 263, got 263"):
        g.tokens([[1], [2, 263]], GREEDY)
    assert g.tokens([[1] * 45], GREEDY)
    with pytest.raises(UserError, match=r"at most 59 tokens .*got 47 .* 13 new ones; set generate.max_new_tokens<=12"):
        g.tokens([[1] * 46], GREEDY)
    with pytest.raises(UserError, match=r"got 60 .*; shorten the prompt"):
        g.stream("x" * 59, GREEDY)
    make = lambda **k: Generator(MODELS["gpt2"], {}, Bytes(), **{"start_id": START, "pad_id": PAD, **k})
    with pytest.raises(UserError, match=r"generate.start_id: expected an id below model.vocab_size 263, got 263"):
        make(start_id=263)
    with pytest.raises(UserError, match="generate.batch_size: expected at least 1, got 0"):
        make(batch_size=0)
    small = dataclasses.replace(MODELS["gpt2"], vocab_size=258)
    with pytest.raises(UserError, match="generate.tokenizer: expected at most model.vocab_size 258 ids, got 259"):
        Generator(small, {}, Bytes(), start_id=START, pad_id=PAD)
