from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import config as configs
from lm.errors import UserError
from lm.mesh import Mesh
from lm.models import Electra, GeneratorSize
from lm.models.base import abstract
from lm.nn.compute import Compute
from lm.nn.param import paths
from lm.objectives import MaskedLM, ReplacedTokens
from lm.objectives.replaced_tokens import filled, gumbel, sample
from tests.models.reference import random_params
from tests.tolerances import assert_close, assert_equal
from tests.training import runs

V = 47  # of the tokenizer; the specials follow
PAD, EOS, MASK, CLS, SEP = 0, 1, V, V + 1, V + 2
IDS = dict(mask_id=MASK, cls_id=CLS, sep_id=SEP, vocab_size=V)
ALL = V + 3
PARTS = ("tokens", "positions", "targets", "weights")
N, S = 6, 61


def text(n=N, seq_len=S, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, V, (n, seq_len + 1)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.05] = EOS
    return {"tokens": tokens, "id": np.arange(n, dtype=np.int64) * 7 + 100}


def ragged() -> dict[str, np.ndarray]:
    """Rows that are full, that are short, that hold one token and that hold none."""
    rows = text()
    for row, length in ((1, 9), (2, 30), (3, 1), (4, 0)):
        rows["tokens"][row, length:] = PAD
    return rows


# --- examples ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seq_len=st.integers(3, 80),
    rate=st.floats(0.01, 0.9),
    span=st.integers(1, 4),
    padding=st.integers(0, 80),
    seed=st.integers(0, 9),
)
def test_inputs_and_targets_give_the_row_back(seq_len, rate, span, padding, seed):
    objective = ReplacedTokens(**IDS, rate=rate, span=span, noise_seed=seed)
    rows = text(5, seq_len, seed)
    rows["tokens"][0, seq_len + 1 - min(padding, seq_len + 1) :] = PAD
    batch = objective.examples(rows)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in objective.features(5, seq_len).items()
    }
    for row, shown, at, targets, weights in zip(rows["tokens"], *(batch[k] for k in PARTS)):
        own = row[: seq_len - 2]
        own = own[own != PAD]
        shown[at[weights > 0]] = targets[weights > 0]
        np.testing.assert_array_equal(shown, [CLS, *own, SEP, *[PAD] * (seq_len - 2 - len(own))])


def test_predicted_tokens_are_masks_but_for_the_share_that_is_left():
    batch = ReplacedTokens(**IDS).examples(text(600, 127))
    counted = batch["weights"] > 0
    shown = np.take_along_axis(batch["tokens"], batch["positions"], axis=1)[counted]
    kept = shown == batch["targets"][counted]
    assert ((shown == MASK) | kept).all()
    assert abs(kept.mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / len(kept))
    shown = ReplacedTokens(**IDS, mask_share=1.0).examples(text(20))
    counted = shown["weights"] > 0
    assert (np.take_along_axis(shown["tokens"], shown["positions"], axis=1)[counted] == MASK).all()


def test_the_masks_are_those_of_a_masked_language_model():
    ours, theirs = (kind(**IDS, mask_share=0.85, random_share=0.0) for kind in (ReplacedTokens, MaskedLM))
    batch = ours.examples(text())
    batch.pop("noise")
    assert_equal(batch, theirs.examples(text()))


def test_the_seed_of_a_row_is_its_examples_own():
    objective = ReplacedTokens(**IDS)
    whole = objective.examples(text())["noise"]
    parts = [objective.examples({k: v[i] for k, v in text().items()})["noise"] for i in ([4, 2], [0], [5, 3, 1])]
    np.testing.assert_array_equal(np.concatenate(parts), whole[[4, 2, 0, 5, 3, 1]])
    assert len(np.unique(whole)) == 2 * N
    other = ReplacedTokens(**IDS, noise_seed=1).examples(text())["noise"]
    assert (other != whole).all()


# --- the draw ---------------------------------------------------------------------------------------------------------

D = 5
RNG = np.random.default_rng(0)
TABLES = {
    "generator": RNG.normal(size=(ALL, D)),
    "place": RNG.normal(size=(S, D)),
    "head": RNG.normal(size=(D, ALL)),
    "discriminator": RNG.normal(size=(ALL, D)),
    "detector": RNG.normal(size=D),
}
PARAMS = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), TABLES)


class Pair:
    """A generator and a discriminator whose states tell the token, the place and the number of valid tokens."""

    def __init__(self, p):
        self.p = p

    def generate(self, tokens, *, dtype, valid, key=None):
        return self._state("generator", tokens, dtype, valid)

    def __call__(self, tokens, *, dtype, valid, key=None):
        return self._state("discriminator", tokens, dtype, valid)

    def _state(self, which, tokens, dtype, valid):
        x = (self.p[which][tokens] + self.p["place"]) * jnp.sum(valid, axis=1)[:, None, None] / S
        return types.SimpleNamespace(hidden=x.astype(dtype))

    def head_fn(self):
        return lambda params, x: (x @ params).astype(jnp.float32), self.p["head"]

    def replaced(self, x):
        return (x @ self.p["detector"]).astype(jnp.float32)


def drawn_in_numpy(logits: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """logits [B,P,V] -> [B,P], a place at a time."""
    out = np.zeros(logits.shape[:2], np.int64)
    for row, place in np.ndindex(*out.shape):
        key = jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(seeds[row]), impl="threefry2x32"), place)
        out[row, place] = np.argmax(logits[row, place] + np.asarray(jax.random.gumbel(key, logits.shape[2:])))
    return out


def seeds(n: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 2**32, (n, 2), dtype=np.uint32)


def draw(x, seeds, chunks=1):
    head, params = Pair(PARAMS).head_fn()
    return np.asarray(jax.jit(lambda x, seeds: sample(head, params, x, seeds, chunks))(x, seeds))


def test_words_are_drawn_from_the_softmax_of_their_place():
    n, places = 3000, 3
    x = RNG.normal(size=(places, D)).astype(np.float32)
    drawn = draw(np.broadcast_to(x, (n, places, D)), seeds(n))
    logits = x.astype(np.float64) @ TABLES["head"]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for place in range(places):
        hits = np.bincount(drawn[:, place], minlength=ALL)
        assert (np.abs(hits / n - p[place]) <= 4.5 * np.sqrt(p[place] * (1 - p[place]) / n) + 1 / n).all()
    # Independent from place to place and from row to row.
    for a, b in ((drawn[:, 0], drawn[:, 1]), (drawn[:-1, 2], drawn[1:, 2])):
        top_a, top_b = np.bincount(a).argmax(), np.bincount(b).argmax()
        both = np.mean((a == top_a) & (b == top_b))
        expected = np.mean(a == top_a) * np.mean(b == top_b)
        assert abs(both - expected) < 4.5 * np.sqrt(expected / n)


@pytest.mark.parametrize("chunks", [2, 3, 6])
def test_a_draw_depends_on_neither_chunks_nor_the_other_rows(chunks):
    x, own = RNG.normal(size=(8, 6, D)).astype(np.float32), seeds(8)
    whole = draw(x, own)
    np.testing.assert_array_equal(draw(x, own, chunks), whole)
    rows = np.array([5, 0, 7])
    np.testing.assert_array_equal(draw(x[rows], own[rows], chunks), whole[rows])
    assert (draw(x, own[::-1]) != whole).any()


def test_the_noise_is_a_standard_gumbel():
    noise = np.asarray(gumbel(seeds(40), jnp.arange(7), 53)).reshape(-1)
    assert abs(noise.mean() - 0.5772) < 4 * np.pi / np.sqrt(6 * noise.size)
    assert abs(np.mean(noise < 1.0) - np.exp(-np.exp(-1.0))) < 4 * 0.5 / np.sqrt(noise.size)


# --- the loss ---------------------------------------------------------------------------------------------------------


def in_numpy(batch, weight=50.0) -> tuple[float, float, float]:
    """(total, nll, weight) of one row after another, in float64."""
    sums = np.zeros(3)
    for row in range(len(batch["tokens"])):
        tokens, at = batch["tokens"][row], batch["positions"][row]
        n, share = int(batch["weights"][row].sum()), (tokens != PAD).sum() / S
        logits = ((TABLES["generator"][tokens] + TABLES["place"]) * share)[at] @ TABLES["head"]
        drawn = drawn_in_numpy(logits[None], batch["noise"][row : row + 1])[0]
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        nll = -sum(log_p[i, batch["targets"][row, i]] for i in range(n))
        original, shown = tokens.copy(), tokens.copy()
        original[at[:n]], shown[at[:n]] = batch["targets"][row, :n], drawn[:n]
        score = (TABLES["discriminator"][shown] + TABLES["place"]) * share @ TABLES["detector"]
        p = 1 / (1 + np.exp(-score))
        wrong = [-np.log(p[s] if shown[s] != original[s] else 1 - p[s]) for s in range(S) if tokens[s] != PAD]
        sums += nll + weight * n * np.mean(wrong), nll, n
    return tuple(sums)


def loss_of(objective, batch, params=PARAMS):
    return jax.jit(lambda p, b: objective.loss(Pair(p), b, dtype=jnp.float32, key=None))(params, batch)


@pytest.mark.parametrize("changes", [{}, dict(detector_weight=7.0, chunks=5, rate=0.16)])
def test_loss_agrees_with_numpy(changes):
    objective = ReplacedTokens(**IDS, **changes)
    objective.check(S)
    batch = objective.examples(ragged())
    assert batch["weights"].sum(axis=1).min() == 0 and len(set(batch["weights"].sum(axis=1))) > 3
    loss = loss_of(objective, batch)
    assert_close(tuple(loss), in_numpy(batch, objective.detector_weight))
    # What a row without text holds is nothing: no loss, and no division by the tokens that it has not.
    rest = {k: np.delete(v, 4, axis=0) for k, v in batch.items()}
    assert_close(tuple(loss_of(objective, rest)), tuple(loss))


def test_the_mean_of_equal_rows_is_the_papers():
    """Eq. 5: the mean over masked tokens and 50 times the mean over all tokens."""
    rows = text()
    rows["tokens"][rows["tokens"] == EOS] = 20  # as many predictions in every row
    objective = ReplacedTokens(**IDS)
    batch = objective.examples(rows)
    loss = loss_of(objective, batch)
    hidden = Pair(PARAMS).generate(batch["tokens"], dtype=jnp.float32, valid=batch["tokens"] != PAD).hidden
    x = jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1)
    shown = filled(batch["tokens"], batch["positions"], draw(x, batch["noise"]), batch["weights"])
    original = filled(*(batch[k] for k in PARTS))
    score = Pair(PARAMS).replaced(Pair(PARAMS)(shown, dtype=jnp.float32, valid=shown >= 0).hidden)
    mean = np.mean(np.log1p(np.exp(np.where(shown != original, -score, score).astype(np.float64))))
    assert_close(loss.total / loss.weight, loss.nll / loss.weight + 50 * mean)


def test_a_word_that_is_drawn_as_it_was_is_no_replacement():
    """A generator that is certain of the token it reads, where it reads tokens as they are, replaces nothing; one that
    is certain of another replaces all. The discriminator's loss tells which."""
    objective = ReplacedTokens(**IDS, mask_share=0.0)
    batch = objective.examples(text())
    n = batch["weights"].sum()
    eye = 100.0 * np.eye(ALL, dtype=np.float32)  # the noise of a word is less than 20

    def judged(head, certain: float) -> float:
        table = {"generator": np.eye(ALL, dtype=np.float32), "head": head, "place": np.zeros((S, 1), np.float32)}
        # The discriminator says the same of every token: "replaced", with log-odds `certain`.
        table |= {"discriminator": np.ones((ALL, 1), np.float32), "detector": np.full(1, certain, np.float32)}
        loss = loss_of(objective, batch, table)
        return float((loss.total - loss.nll) / loss.weight / 50)

    says = 3.0
    right, wrong = np.log1p(np.exp(-says)), np.log1p(np.exp(says))
    assert_close(judged(eye, says), wrong)
    share = batch["weights"].sum(axis=1) / S  # replaced, of a row
    expected = np.sum(share * (share * right + (1 - share) * wrong)) * S / n
    assert_close(judged(np.roll(eye, 1, axis=1), says), expected)


def test_the_share_of_replacements_is_that_of_a_generator_that_knows_nothing():
    objective = ReplacedTokens(**IDS)
    batch = objective.examples(text(300, S))
    drawn = draw(np.zeros((300, 10, D), np.float32), batch["noise"])
    original = filled(*(batch[k] for k in PARTS))
    shown = filled(batch["tokens"], batch["positions"], drawn, batch["weights"])
    n = batch["weights"].sum()
    p = 1 - 1 / ALL
    assert abs(np.asarray(shown != original).sum() / n - p) < 4 * np.sqrt(p * (1 - p) / n)


def test_score_is_the_generators_nll_and_the_bytes_of_the_masked_tokens():
    objective = ReplacedTokens(**IDS, z_loss=0.1)
    batch = objective.examples(ragged())
    token_bytes = np.arange(100, 100 + ALL).astype(np.int32)
    score = jax.jit(lambda p, b, n: objective.score(Pair(p), b, n, dtype=jnp.float32))(PARAMS, batch, token_bytes)
    _, nll, weight = in_numpy(batch)
    assert_close(tuple(map(np.sum, score)), (nll, weight, float(np.sum(batch["weights"] * (100 + batch["targets"])))))
    assert objective.unit == "masked token"


# --- a model that learns ----------------------------------------------------------------------------------------------

MODEL = Electra(
    vocab_size=56,
    d_embed=12,
    d_model=24,
    n_layers=1,
    n_heads=4,
    d_ff=36,
    max_positions=12,
    generator=GeneratorSize(d_model=16, n_heads=2, d_ff=20),
    compute=Compute(remat="none"),
)
OBJECTIVE = ReplacedTokens(**IDS, rate=0.3)
RUN = runs.config(model=MODEL, objective=OBJECTIVE, optim=dict(ema_decay=None))


def batch() -> dict[str, np.ndarray]:
    rows = text(runs.B, runs.S, seed=5)
    rows["tokens"][3, 7:] = rows["tokens"][6, 4:] = PAD
    return OBJECTIVE.examples(rows)


def test_the_discriminator_teaches_the_generator_nothing_but_the_embedding_both_read():
    params, of = random_params(MODEL), batch()

    @jax.jit
    def both(params):
        def total(params, weight):
            objective = dataclasses.replace(OBJECTIVE, detector_weight=weight)
            return objective.loss(nnx.merge(abstract(MODEL).graphdef, params), of, dtype=jnp.float32, key=None).total

        return jax.grad(total)(params, 0.0), jax.grad(total)(params, 50.0)

    alone, together = (paths(g) for g in both(params))
    for path, g in together.items():
        moved = np.abs(np.asarray(g - alone[path])).max()
        if path.startswith("generator."):
            assert moved == 0 or moved < 1e-6 * np.abs(np.asarray(g)).max(), path
        elif path.split(".")[0] in ("embed", "positions", "types", "norm"):
            assert moved > 0.1 and np.abs(np.asarray(alone[path])).max() > 0.1, path
        else:
            assert (np.asarray(alone[path]) == 0).all(), path
            if not path.endswith("k_bias"):  # a bias on all keys alike changes no softmax
                assert moved > 0.01, path


@functools.cache
def stepped(mesh: Mesh = runs.ONE_DEVICE, microbatches: int = 1):
    """(state, metrics) after a step; the momentum in the state is the gradient."""
    train = dataclasses.replace(RUN.train, microbatches=microbatches)
    setup = runs.make_setup(dataclasses.replace(RUN, train=train), mesh)
    state, metrics = setup.step(runs.start(setup), runs.put(batch(), setup.batch_shardings))
    return jax.tree.map(np.array, (state, metrics))


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_compute_what_one_batch_does(microbatches):
    assert_close(stepped(microbatches=microbatches), stepped())


MESHES = [Mesh(fsdp=4, tensor=2), Mesh(data=2, fsdp=1, seq=2, tensor=2)]


@pytest.mark.parametrize("mesh", [MESHES[1], pytest.param(MESHES[0], marks=pytest.mark.slow)], ids=["seq", "tensor"])
def test_eight_devices_compute_what_one_does(mesh):
    assert_close(stepped(mesh), stepped())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pair="sop"), "objective.pair: expected 'none' for ReplacedTokens, got 'sop'; take MaskedLM"),
        (dict(detector_weight=-1.0), "objective.detector_weight: expected 0 or more, got -1.0; ELECTRA has 50"),
        (dict(mask_share=0.9, random_share=0.2), r"sum of at most 1, got \(0.9, 0.2\)"),
        (dict(rate=1.0), "objective.rate: expected a share between 0 and 1, got 1.0"),
        (dict(sep_id=V), "expected different ids of 0 and more for pad_id"),
    ],
)
def test_a_wrong_field_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        ReplacedTokens(**IDS | change)


REFUSED = [
    (
        "electra_tiny",
        "model.task=LanguageModeling()",
        "model.task: ReplacedTokens trains MaskedLMAndReplaced, got LanguageModeling",
    ),
    (
        "electra_tiny",
        "objective=MaskedLM(mask_id=4096, cls_id=4097, sep_id=4098, vocab_size=4096)",
        "model.task: MaskedLM trains LanguageModeling or MaskedLMAndPair, got MaskedLMAndReplaced",
    ),
    (
        "bert_tiny",
        "objective=ReplacedTokens(mask_id=4096, cls_id=4097, sep_id=4098, vocab_size=4096)",
        "model.task: ReplacedTokens trains MaskedLMAndReplaced, got MaskedLMAndPair",
    ),
    ("electra_tiny", "model.generator.n_heads=3", "model.generator.n_heads: expected a divisor of"),
]


@pytest.mark.parametrize("recipe, override, message", REFUSED)
def test_what_does_not_go_together_is_refused_when_it_is_loaded(recipe, override, message):
    with pytest.raises(UserError) as e:
        configs.resolve(recipe, [override])
    assert message in str(e.value) and "\n" not in str(e.value)
