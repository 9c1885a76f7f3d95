import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UserError
from lm.generation.cached import Given
from lm.generation.defaults import generation_defaults
from lm.generation.engine import Engine
from lm.generation.processors import Search
from lm.generation.search import searching

V, D, N, EOS, PAD = 4, 5, 3, 1, 2
COMPLETE = sum(3**i for i in range(N - 1)) + 3 ** (N - 1) * V  # sequences of at most N tokens that end, or are full


class Recurrent:
    """h' = tanh(h A + E[token]), logits = h U: a model whose whole history is in its cache."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.a, self.e, self.u = rng.normal(size=(D, D)), rng.normal(size=(V, D)) * 2, rng.normal(size=(D, V)) * 2

    def advance(self, h, tokens):
        return np.tanh(h @ self.a + self.e[tokens])

    def log_probs(self, h):
        logits = h @ self.u
        return logits - np.log(np.exp(logits).sum())

    def split(self, params):
        return params

    def prefill(self, params, given, new):
        h = params["h"]
        return h @ jnp.asarray(self.u, jnp.float32), {"h": h}

    def step(self, params, tokens, index, n, cache):
        f32 = lambda x: jnp.asarray(x, jnp.float32)
        h = jnp.tanh(cache["h"] @ f32(self.a) + f32(self.e)[tokens])
        return h @ f32(self.u), {"h": h}

    def run(self, prompts: np.ndarray, s: Search):
        h = np.zeros((len(prompts), D))
        for tokens in prompts.T:
            h = self.advance(h, tokens)
        return found(self.engine, {"h": jnp.asarray(h, jnp.float32)}, given(prompts), s)

    @functools.cached_property
    def engine(self):
        return Engine(self)


def given(prompts) -> Given:
    """Whole prompts, that are also what a model reads."""
    prompts = np.asarray(prompts, np.int32)
    return Given(prompts, np.ones(prompts.shape, bool), prompts, prompts, np.zeros(len(prompts), np.int32))


def found(engine: Engine, params, prompts: Given, s: Search):
    strategy = searching(s)
    state = engine.start(params, prompts, None, strategy=strategy, new=s.max_new_tokens)
    return strategy.found(engine.advance(params, state, s.max_new_tokens).choice)


def enumerate_all(model: Recurrent, prompt: np.ndarray, length_penalty: float):
    """Every sequence in float64, [(score, tokens)] best first."""
    h = np.zeros(D)
    for token in prompt:
        h = model.advance(h, token)
    found = []

    def grow(h, total, tokens):
        if tokens and (tokens[-1] == EOS or len(tokens) == N):
            found.append((total / len(tokens) ** length_penalty, tokens))
            return
        for token, log_p in enumerate(model.log_probs(h)):
            grow(model.advance(h, token), total + log_p, (*tokens, token))

    grow(h, 0.0, ())
    return sorted(found, reverse=True)


def settings(**kwargs) -> Search:
    return Search(**{"max_new_tokens": N, "pad_token_id": PAD, "eos_token_id": (EOS,), **kwargs})


PROMPTS = np.array([[0, 3], [2, 0], [3, 3]], np.int32)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.7, 2.0])
def test_enough_beams_find_every_sequence_in_order(length_penalty):
    model = Recurrent()
    s = settings(num_beams=COMPLETE, num_return_sequences=COMPLETE, length_penalty=length_penalty)
    found = model.run(PROMPTS, s)
    per_prompt = [np.asarray(x).reshape(len(PROMPTS), COMPLETE, -1) for x in found]
    for prompt, sequences, scores, lengths in zip(PROMPTS, *per_prompt):
        want = enumerate_all(model, prompt, length_penalty)
        assert len(want) == COMPLETE
        np.testing.assert_allclose(scores[:, 0], [score for score, _ in want], rtol=1e-5)
        assert lengths[:, 0].tolist() == [len(tokens) for _, tokens in want]
        filled = [[*prompt, *tokens, *[PAD] * (N - len(tokens))] for _, tokens in want]
        assert sequences.tolist() == filled


def test_greedy_follows_the_likeliest_token_and_sums_its_log_probabilities():
    model = Recurrent()
    found = model.run(PROMPTS, settings())
    for prompt, got, score, length in zip(PROMPTS, *map(np.asarray, found)):
        h, total, tokens = np.zeros(D), 0.0, []
        for token in prompt:
            h = model.advance(h, token)
        while len(tokens) < N and EOS not in tokens:
            log_probs = model.log_probs(h)
            tokens.append(int(log_probs.argmax()))
            total += log_probs.max()
            h = model.advance(h, tokens[-1])
        assert got.tolist() == [*prompt, *tokens, *[PAD] * (N - len(tokens))]
        assert (length, score) == (len(tokens), pytest.approx(total, rel=1e-5))


@pytest.mark.parametrize("num_beams, early_stopping", [(1, False), (3, True), (3, False), (3, "never")])
def test_a_prompt_does_not_depend_on_the_others(num_beams, early_stopping):
    model = Recurrent(3)
    s = settings(num_beams=num_beams, num_return_sequences=num_beams, early_stopping=early_stopping, max_new_tokens=7)
    together = model.run(PROMPTS, s)
    for i in range(len(PROMPTS)):
        alone = model.run(PROMPTS[i : i + 1], s)
        rows = slice(i * num_beams, (i + 1) * num_beams)
        np.testing.assert_array_equal(alone.sequences, together.sequences[rows])
        np.testing.assert_array_equal(alone.lengths, together.lengths[rows])
        np.testing.assert_allclose(alone.scores, together.scores[rows], rtol=1e-5)


@pytest.mark.parametrize("num_beams, early_stopping", [(1, False), (3, True)])
def test_the_model_runs_no_more_once_every_prompt_is_done(num_beams, early_stopping):
    calls = []

    class Counted(Recurrent):
        def step(self, params, tokens, index, n, cache):
            jax.debug.callback(lambda n: calls.append(int(n)), n)
            return super().step(params, tokens, index, n, cache)

    s = settings(num_beams=num_beams, num_return_sequences=num_beams, early_stopping=early_stopping, max_new_tokens=13)
    done = found(Counted().engine, {"h": jnp.zeros((1, D))}, given([[0]]), s)
    jax.effects_barrier()
    longest = int(done.lengths.max())
    assert longest < 13
    assert sorted(calls) == list(range(1, longest))


def test_trim_cuts_after_the_longest_row():
    done = Recurrent().run(PROMPTS, settings(max_new_tokens=11))
    longest = int(done.lengths.max())
    assert longest < 11
    assert done.trim(2).shape == (3, 2 + longest)
    assert (done.sequences[:, 2 + longest :] == PAD).all()


# ---- against transformers


B, P, S = 3, 5, 6
NEW = 9
PROMPT = np.random.default_rng(1).integers(8, 41, (B, P))
START = np.array([0, 2, 1])
ENCODED = np.random.default_rng(2).integers(8, 37, (B, S))


def decoder_only(torch, n_positions=64):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=41, n_embd=12, n_layer=2, n_head=2, n_positions=n_positions, bos_token_id=5, eos_token_id=5,
        pad_token_id=3, tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def bart(torch):
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=37, d_model=12, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=64, pad_token_id=1,
        bos_token_id=0, eos_token_id=5, decoder_start_token_id=5, forced_eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def t5(torch):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=37, d_model=12, d_kv=6, d_ff=20, num_layers=2, num_heads=2, pad_token_id=0,
        eos_token_id=5, decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def models():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(7)
    made = {}
    for name, build in {"gpt2": decoder_only, "bart": bart, "t5": t5}.items():
        model = build(torch).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_()
        # The end tokens 5 and 6 hang on the context more than others do, so that beams end at different times.
        model.lm_head = torch.nn.Linear(12, model.config.vocab_size)
        model.lm_head.weight.data.normal_(0.0, 0.3)
        model.lm_head.weight.data[5:7] *= 3
        model.lm_head.bias.data.zero_()
        made[name] = model
    return made


def both(model, **kwargs):
    """(sequences, scores) of transformers, and ours on logits that the same torch model gives, cache and all apart."""
    import torch

    seq2seq = model.config.is_encoder_decoder
    mask = np.arange(P) >= START[:, None]
    text = torch.from_numpy(ENCODED if seq2seq else np.where(mask, PROMPT, 3))
    kwargs = {"max_new_tokens": NEW, **kwargs}
    extra = {} if seq2seq else {"attention_mask": torch.from_numpy(mask.astype(int))}
    with torch.no_grad():
        theirs = model.generate(text, return_dict_in_generate=True, output_scores=True, **extra, **kwargs)

    prompt = np.full((B, 1), model.config.decoder_start_token_id) if seq2seq else text.numpy()
    prompt_len = prompt.shape[1]
    s = generation_defaults(model.config.to_dict(), model.generation_config.to_dict(), prompt_len=prompt_len, **kwargs)

    def forward(ids, row, length):
        ids = torch.from_numpy(np.array(ids, np.int64)[:, : int(length)])
        row = np.array(row, np.int64)
        with torch.no_grad():
            if seq2seq:
                logits = model(input_ids=torch.from_numpy(row), decoder_input_ids=ids).logits
            else:
                attends = torch.from_numpy((np.arange(ids.shape[1]) >= row).astype(int))
                positions = (attends.cumsum(1) - 1).clamp(min=0)
                logits = model(input_ids=ids, attention_mask=attends, position_ids=positions).logits
        return logits[:, -1].numpy()

    class Torch:
        split = staticmethod(lambda params: params)

        def prefill(self, params, given, new):
            ids = jnp.pad(given.prompts, ((0, 0), (0, new)))
            return self.logits(ids, params, prompt_len), {"ids": ids, "row": params}

        def step(self, params, tokens, index, n, cache):
            ids = cache["ids"].at[:, index].set(tokens)
            return self.logits(ids, cache["row"], index + 1), {**cache, "ids": ids}

        def logits(self, ids, row, length):
            shape = jax.ShapeDtypeStruct((ids.shape[0], model.config.vocab_size), jnp.float32)
            return jax.pure_callback(forward, shape, ids, row, length)

    row = (ENCODED if seq2seq else START[:, None]).astype(np.int32)
    read, first = text.numpy().astype(np.int32), np.zeros(B, np.int32) if seq2seq else START
    asked = Given(read, np.ones_like(read, bool) if seq2seq else mask, prompt.astype(np.int32), read, first)
    ours = found(Engine(Torch()), row, asked, s)
    if s.num_beams > 1:
        scores = theirs.sequences_scores.numpy()
    else:
        each = model.compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=True).numpy()
        scores = np.where(np.arange(each.shape[1]) < np.asarray(ours.lengths)[:, None], each, 0.0).sum(axis=1)
    return (theirs.sequences.numpy(), scores), (ours.trim(prompt_len), ours.scores), ours


GREEDY = dict(num_beams=1)
# Twice as many end tokens as beams, which fill the best candidates: enough others must be kept to go on with.
MANY = [5, 6, 7, 8]
LIKELY = dict(sequence_bias=[[[i], 4.0] for i in MANY], renormalize_logits=True)
CASES = [
    ("gpt2", GREEDY),
    ("gpt2", dict(repetition_penalty=1.7, no_repeat_ngram_size=2, min_length=P + 4)),
    ("gpt2", dict(bad_words_ids=[[9], [5], [11, 12]], suppress_tokens=[20, 21], eos_token_id=[5, 6])),
    ("bart", dict(forced_bos_token_id=0, forced_eos_token_id=5, begin_suppress_tokens=[6, 7])),
    ("t5", dict(min_new_tokens=3, encoder_no_repeat_ngram_size=1, max_length=8, max_new_tokens=None)),
    ("gpt2", dict(num_beams=2)),
    ("gpt2", dict(num_beams=3, length_penalty=0.5, early_stopping=True, num_return_sequences=3)),
    ("gpt2", dict(num_beams=3, length_penalty=2.0, early_stopping="never", num_return_sequences=2)),
    ("gpt2", dict(num_beams=4, length_penalty=0.0, num_return_sequences=4)),
    ("gpt2", dict(num_beams=3, length_penalty=-1.0, early_stopping="never", num_return_sequences=3)),
    ("gpt2", dict(num_beams=2, repetition_penalty=1.6, no_repeat_ngram_size=2, num_return_sequences=2)),
    ("gpt2", dict(num_beams=3, eos_token_id=[5, 6, 7], length_penalty=2.0, num_return_sequences=3)),
    ("gpt2", dict(num_beams=2, eos_token_id=MANY, **LIKELY, length_penalty=2.0, early_stopping="never")),
    ("gpt2", dict(num_beams=3, eos_token_id=None, num_return_sequences=2)),
    ("gpt2", dict(num_beams=2, exponential_decay_length_penalty=(2, 0.8), renormalize_logits=True)),
    ("bart", dict(num_beams=4, length_penalty=2.0, no_repeat_ngram_size=3, min_length=4, forced_eos_token_id=5)),
    ("bart", dict(num_beams=3, forced_bos_token_id=0, early_stopping=True, num_return_sequences=3)),
    ("bart", dict(num_beams=2, bad_words_ids=[[9], [11, 12]], sequence_bias=[[[14], 2.5], [[14, 15], -3.0]])),
    ("bart", dict(num_beams=2, forced_eos_token_id=6, eos_token_id=[5, 6], max_new_tokens=3)),
    ("t5", dict(num_beams=2, num_return_sequences=2)),
    ("t5", dict(num_beams=4, length_penalty=0.5, early_stopping=True, encoder_repetition_penalty=1.4)),
    ("t5", dict(num_beams=3, early_stopping="never", encoder_no_repeat_ngram_size=2, max_new_tokens=1)),
]


@pytest.mark.hf
@pytest.mark.parametrize("name, kwargs", CASES, ids=[f"{name}-{kwargs}" for name, kwargs in CASES])
def test_sequences_and_scores_are_those_of_transformers(models, name, kwargs):
    (sequences, scores), (got_sequences, got_scores), _ = both(models[name], **kwargs)
    np.testing.assert_array_equal(got_sequences, sequences)
    np.testing.assert_allclose(got_scores, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.hf
def test_the_comparison_sees_beams_that_end_at_different_times(models):
    for name, model in models.items():
        _, _, ours = both(model, num_beams=4, num_return_sequences=4)
        lengths = np.asarray(ours.lengths)
        assert len(set(lengths.tolist())) >= 3, name
        assert lengths.min() < NEW, name


FILES = [
    (dict(max_length=13, num_beams=4, length_penalty=2.0, no_repeat_ngram_size=3), None),
    (dict(max_length=13, num_beams=4, eos_token_id=9), dict(num_beams=2, eos_token_id=[5, 6], pad_token_id=3)),
    (dict(), dict(max_new_tokens=6, max_length=11, min_length=7, bad_words_ids=[[4], [6, 7]], temperature=0.3)),
    (dict(n_positions=17), dict()),
    (dict(), dict(do_sample=True, top_p=0.9, forced_eos_token_id=5, begin_suppress_tokens=[5])),
]
ARGUMENTS = [
    dict(),
    dict(max_new_tokens=4, min_new_tokens=2, num_beams=3, early_stopping="never"),
    dict(max_length=12),
]


@pytest.mark.hf
@pytest.mark.parametrize("config, generation", FILES, ids=str)
def test_settings_resolve_as_transformers_resolves_them(tmp_path, config, generation):
    torch = pytest.importorskip("torch")
    from transformers import GPT2LMHeadModel

    decoder_only(torch, config.get("n_positions", 64)).save_pretrained(tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), **config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    for kwargs in ARGUMENTS:
        kwargs = {**kwargs, "do_sample": False}
        theirs, _ = model._prepare_generation_config(None, **kwargs)
        unset = model.generation_config.max_length is None and "max_length" not in kwargs
        theirs = model._prepare_generated_length(theirs, unset, True, "input_ids", P, torch.zeros(1, P))
        ours = generation_defaults(config, generation, prompt_len=P, **kwargs)
        assert ours.max_new_tokens + P == theirs.max_length
        assert max(ours.min_length, ours.min_new_tokens and ours.min_new_tokens + P) == theirs.min_length
        eos = theirs.eos_token_id
        assert ours.eos_token_id == (() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos))
        assert ours.pad_token_id == (theirs.pad_token_id or next(iter(ours.eos_token_id), 0))
        same = "num_beams", "length_penalty", "early_stopping", "no_repeat_ngram_size", "forced_eos_token_id"
        assert [getattr(ours, n) for n in same] == [getattr(theirs, n) for n in same]
        assert [list(w) for w in ours.bad_words_ids] == (theirs.bad_words_ids or [])
        assert list(ours.begin_suppress_tokens) == (theirs.begin_suppress_tokens or [])


def test_the_text_part_of_an_old_config_fills_what_the_config_leaves_open():
    config = dict(num_beams=3, decoder=dict(num_beams=5, eos_token_id=7), bos_token_id=2, no_such_thing=1)
    s = generation_defaults(dict(config, force_bos_token_to_be_generated=True), None, prompt_len=1)
    assert s == Search(max_new_tokens=20, num_beams=3, eos_token_id=(7,), pad_token_id=7, forced_bos_token_id=2)


@pytest.mark.parametrize(
    "generation, kwargs, message",
    [
        ({}, dict(num_beam=3), r"generate.num_beam: .*; did you mean 'num_beams'\?"),
        ({}, dict(do_sample=True), "generate.do_sample: expected False in a search, got True; .* lm.generation.Sampl"),
        (dict(do_sample=True), {}, "pass do_sample=False"),
        ({}, dict(temperature=0.5), "generate.temperature: expected nothing in a search, got 0.5"),
        (dict(num_beam_groups=2), {}, "generate.num_beam_groups: expected none in a search, got 2"),
        ({}, dict(max_length=P), "generate.max_length: expected more than the prompt's 5, got 5"),
    ],
    ids=str,
)
def test_arguments_that_no_search_takes_are_refused(generation, kwargs, message):
    with pytest.raises(UserError, match=message):
        generation_defaults({}, generation, prompt_len=P, **kwargs)


def test_shapes_that_disagree_are_refused():
    prompts, h = given(jnp.zeros((3, 2))), jnp.zeros((3, D))

    class Shaped(Recurrent):
        def prefill(self, params, given, new):
            return params["logits"], params["cache"]

    def refused(message, *, s=None, cache=None, logits=None, **shapes):
        made = {
            "logits": jnp.zeros((3, V)) if logits is None else logits,
            "cache": {"h": h} if cache is None else cache,
        }
        with pytest.raises(UserError, match=message):
            found(Shaped().engine, made, prompts._replace(**shapes), s or settings(num_beams=2))

    refused(r"generate.cache\['h'\]: expected a leading batch axis of size 3", cache={"h": jnp.zeros((5, D))})
    refused("generate.cache: expected a leading batch axis", cache=jnp.float32(1))
    refused(r"generate.logits: expected \[3, vocabulary\], got \[2, 4\]", logits=jnp.zeros((2, V)))
    refused("generate.prompts: expected", prompts=jnp.zeros((3, 0), jnp.int32))
    refused(r"generate.valid: expected \[3, 2\] as read", valid=jnp.ones((3, 7), bool))
    refused(r"generate.source: expected \[3, 2\] as read", source=jnp.zeros((3, 7), jnp.int32))
    refused(r"generate.read: expected \[3, length\]", read=jnp.zeros((2, 7), jnp.int32))
    refused("vocabulary of more than 4 ids, got 4", s=settings(num_beams=2, eos_token_id=(0, 1, 2, 3)))
    refused("bad_words_ids: expected ids below the vocabulary's size 4, got 9", s=settings(bad_words_ids=((9,),)))
