from __future__ import annotations

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import codec
from lm.errors import UserError
from lm.models import Llama
from lm.models.base import abstract
from lm.nn.position import Rope
from lm.objectives import UL2, CausalLM, Denoiser, Objective, SpanCorruption, UL2Decoder
from lm.objectives.ul2 import PAPER
from tests.models.reference import random_params
from tests.tolerances import assert_close, assert_equal

V, N_SENTINELS = 43, 31
FIRST = V + N_SENTINELS - 1
R, S_ID, X = FIRST + 1, FIRST + 2, FIRST + 3
PAD, EOS = 0, 1
MODES = {"R": R, "S": S_ID, "X": X}
IDS = dict(first_sentinel_id=FIRST, n_sentinels=N_SENTINELS, r_id=R, s_id=S_ID, x_id=X)
N, S = 29, 53


def text(n=N, seq_len=S, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, V, (n, seq_len + 1)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.05] = EOS
    return {"tokens": tokens, "id": np.arange(n, dtype=np.int64) * 5 + 30}


def real(row: np.ndarray) -> list[int]:
    out = row.tolist()
    while out and out[-1] == PAD:
        out.pop()
    return out


def restored(inputs: list[int], targets: list[int]) -> list[int]:
    """The text, from inputs without their mode and from targets."""

    def parts(tokens):
        assert tokens[-1] == EOS
        out: list[list[int]] = [[]]
        for t in tokens[:-1]:
            if V <= t <= FIRST:
                assert t == FIRST - (len(out) - 1)
                out.append([])
            else:
                out[-1].append(t)
        return out

    kept, lost = parts(inputs), parts(targets)
    assert lost[0] == [] and len(kept) == len(lost)
    return [t for k, m in zip(kept, [*lost[1:], []]) for t in k + m]


@pytest.mark.parametrize("kind", [UL2, UL2Decoder])
@pytest.mark.parametrize("seq_len", [2, 17, S])
def test_every_row_gives_its_text_back_and_names_its_mode(kind, seq_len):
    objective = kind(**IDS)
    objective.check(seq_len)
    rows = text(seq_len=seq_len)
    rows["tokens"][3, min(9, seq_len) :] = PAD
    batch = objective.examples(rows)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in objective.features(N, seq_len).items()
    }
    for i, chosen in enumerate(objective.denoiser_of(rows["id"])):
        if kind is UL2:
            inputs, targets = real(batch["inputs"][i]), real(batch["targets"][i])
        else:
            n = batch["prefix"][i].sum()
            assert batch["prefix"][i, :n].all()
            inputs, targets = batch["tokens"][i, :n].tolist(), real(batch["tokens"][i, n:])
        assert inputs[0] == MODES[objective.denoisers[chosen].mode]
        assert restored(inputs[1:], targets) == real(rows["tokens"][i, :-1])


def test_rows_of_a_denoiser_are_those_of_span_corruption_with_the_mode_in_front():
    objective, rows = UL2(**IDS, noise_seed=4), text(80)
    batch, chosen = objective.examples(rows), objective.denoiser_of(rows["id"])
    for i, d in enumerate(objective.denoisers):
        alone = SpanCorruption(
            first_sentinel_id=FIRST,
            n_sentinels=N_SENTINELS,
            noise_density=d.noise_density,
            mean_span=d.mean_span or S,
            noise_seed=4,
        )
        expected, which = alone.examples(rows), np.flatnonzero(chosen == i)
        assert len(which)
        n, m = expected["inputs"].shape[1], expected["targets"].shape[1]
        assert (n + 1, m) == tuple(objective.lengths(S)[i])
        np.testing.assert_array_equal(batch["inputs"][which, 1 : n + 1], expected["inputs"][which])
        np.testing.assert_array_equal(batch["targets"][which, :m], expected["targets"][which])
        assert (batch["inputs"][which, n + 1 :] == PAD).all() and (batch["targets"][which, m:] == PAD).all()


def test_a_sequential_denoiser_writes_the_end_of_the_row():
    objective, rows = UL2(**IDS, denoisers=(Denoiser(mode="S", noise_density=0.25),)), text()
    batch, n = objective.examples(rows), round(0.25 * S)
    for i, tokens in enumerate(rows["tokens"][:, :-1].tolist()):
        assert batch["inputs"][i].tolist() == [S_ID, *tokens[: S - n], FIRST, EOS]
        assert batch["targets"][i].tolist() == [FIRST, *tokens[S - n :], EOS]
    assert objective.padding(S) == 0.0


def test_denoisers_have_their_shares_within_binomial_bounds():
    objective = UL2(**IDS)
    hits = np.bincount(objective.denoiser_of(np.arange(20_000)), minlength=7) / 20_000
    weights = np.array([2, 2, 3, 2, 2, 2, 2]) / 15
    np.testing.assert_allclose(objective.shares, weights)
    assert (np.abs(hits - weights) < 4.5 * np.sqrt(weights * (1 - weights) / 20_000)).all()


@pytest.mark.parametrize("kind", [UL2, UL2Decoder])
def test_padding_is_the_share_of_the_slots_that_the_rows_leave(kind):
    objective = kind(**IDS)
    batch = objective.examples(text(4000))
    names = ("inputs", "targets") if kind is UL2 else ("tokens",)
    slots = np.hstack([batch[n] for n in names])
    assert abs((slots == PAD).mean() - objective.padding(S)) < 0.005
    assert 0.0 < UL2Decoder(**IDS).padding(S) < UL2(**IDS).padding(S) < 0.5


@pytest.mark.parametrize("kind", [UL2, UL2Decoder])
def test_rows_are_the_same_whatever_the_batch(kind):
    objective, rows = kind(**IDS), text()
    whole = objective.examples(rows)
    parts = [objective.examples({k: v[i] for k, v in rows.items()}) for i in np.array_split(np.arange(N)[::-1], 4)]
    for name, x in whole.items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts])[::-1], x)


class Both:
    """An encoder-decoder whose hidden states tell the valid inputs and the tokens so far."""

    rng = np.random.default_rng(0)
    table, head = rng.normal(size=(X + 1, 5)).astype(np.float32), rng.normal(size=(5, X + 1)).astype(np.float32)

    def __call__(self, inputs, targets, *, dtype, valid, key):
        x = jnp.asarray(self.table)
        memory = jnp.sum(x[inputs] * valid[..., None], axis=1, keepdims=True) / 10
        return types.SimpleNamespace(hidden=x[targets] + memory)

    def head_fn(self):
        return lambda params, x: x @ params, jnp.asarray(self.head)


def test_padding_to_the_longest_does_not_change_the_loss():
    rows = text(5)
    two = (Denoiser(mode="R", noise_density=0.15, mean_span=3.0), Denoiser(mode="X", noise_density=0.5, mean_span=8.0))
    objective = UL2(**IDS, denoisers=two, z_loss=0.01)
    f = jax.jit(lambda b: objective.loss(Both(), b, dtype=jnp.float32, key=None))
    batch, chosen = objective.examples(rows), objective.denoiser_of(rows["id"])
    assert set(chosen) == {0, 1}
    alone = []
    for i, row in enumerate(chosen):
        n, m = objective.lengths(S)[row]
        own = {"inputs": batch["inputs"][i : i + 1, :n], "targets": batch["targets"][i : i + 1, :m]}
        assert (own["inputs"] != PAD).all() and (own["targets"] != PAD).all()
        alone.append(f(own))
    assert_close(f(batch), jax.tree.map(lambda *x: sum(x), *alone))


def test_the_decoder_form_reads_the_prefix_both_ways_and_loses_on_the_targets_alone():
    model = Llama(vocab_size=X + 1, d_model=12, n_layers=1, n_heads=2, d_ff=20, rope=Rope(theta=50.0))
    graphdef, params = abstract(model).graphdef, random_params(model)
    objective = UL2Decoder(**IDS, z_loss=0.01)
    batch = objective.examples(text(6))
    merged = lambda p: nnx.merge(graphdef, p)
    loss = jax.jit(lambda p, b: objective.loss(merged(p), b, dtype=jnp.float32, key=None))(params, batch)
    tokens, prefix = batch["tokens"], batch["prefix"]
    read = lambda p: merged(p).logits(merged(p)(tokens[:, :-1], dtype=jnp.float32, prefix=prefix).hidden)
    log_p = np.asarray(jax.nn.log_softmax(jax.jit(read)(params)), np.float64)
    targets, n = tokens[:, 1:], prefix.sum(axis=1)
    counted = [(i, p) for i in range(6) for p in range(n[i] - 1, targets.shape[1]) if targets[i, p] != PAD]
    nll = -sum(log_p[i, p, targets[i, p]] for i, p in counted)
    assert_close((loss.nll, loss.weight), (nll, float(len(counted))))
    n_bytes = np.full(X + 1, 3, np.int32)
    score = jax.jit(lambda p, b: objective.score(merged(p), b, n_bytes, dtype=jnp.float32))(params, batch)
    n_text = sum(not V <= targets[i, p] <= FIRST for i, p in counted)
    assert_close(tuple(map(np.sum, score)), (loss.nll, loss.weight, 3.0 * n_text))
    assert objective.row(S).length == tokens.shape[1] - 1 == objective.longest(S)
    assert objective.unit == "target" and CausalLM().unit == "token"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(denoisers=()), r"objective.denoisers: expected at least one, got \(\)"),
        (dict(r_id=X), "expected different ids of 0 and more, none of them a sentinel"),
        (dict(s_id=FIRST - 3), "none of them a sentinel, .* and sentinels 43 to 73"),
        (dict(chunks=0), "objective.chunks: expected at least 1, got 0"),
        (dict(z_loss=-1.0), "objective.z_loss: expected 0 or more, got -1.0"),
        (dict(n_sentinels=80), "objective.first_sentinel_id: expected one above the specials"),
    ],
)
@pytest.mark.parametrize("kind", [UL2, UL2Decoder])
def test_a_wrong_field_is_refused_by_name(kind, change, message):
    with pytest.raises(UserError, match=message):
        kind(**IDS | change)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(noise_density=1.0), r"expected a noise_density between 0 and 1, got 1.0 \(X\)"),
        (dict(mean_span=0.5), "expected a mean_span of at least 1 token, or None, got 0.5"),
        (dict(weight=0.0), "expected a weight above 0, got 0.0"),
    ],
)
def test_a_wrong_denoiser_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        Denoiser(**{"mode": "X", "noise_density": 0.5} | change)


@pytest.mark.parametrize("kind", [UL2, UL2Decoder])
def test_the_denoisers_survive_json(kind):
    objective = kind(**IDS, denoisers=(Denoiser(mode="X", noise_density=0.5, mean_span=8.0, weight=3.0), *PAPER))
    assert codec.decode(Objective, json.loads(json.dumps(codec.encode(objective)))) == objective


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="objective.n_sentinels: expected at least 50, .* got 31"):
        UL2(**IDS).check(300)
    most = int(UL2(**IDS).lengths(S)[:, 1].max())
    with pytest.raises(UserError, match=f"objective.chunks: 7 does not divide the {most} targets of data.seq_len 53"):
        UL2(**IDS, chunks=7).check(S)
    n = UL2Decoder(**IDS).longest(S)
    with pytest.raises(UserError, match=f"objective.chunks: 1000 does not divide the {n} tokens"):
        UL2Decoder(**IDS, chunks=1000).check(S)
    assert_equal(dataclasses.replace(UL2(**IDS), chunks=most).check(S), None)
