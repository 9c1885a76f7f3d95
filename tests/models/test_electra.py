"""ELECTRA against transformers, its size and cost, and what its two encoders share and do not share."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.errors import UserError
from lm.models import Electra, GeneratorSize, LanguageModeling
from lm.models.base import abstract
from lm.models.cost import count, flops_per_token
from lm.nn.compute import Compute
from lm.nn.param import paths
from lm.objectives import ReplacedTokens
from lm.objectives.replaced_tokens import filled, sample
from tests.halves import slow_but
from tests.models.reference import random_params
from tests.tolerances import assert_close, assert_equal

V, E, D, G = 53, 11, 21, 10  # words, embedding, discriminator, generator
MODEL = Electra(
    vocab_size=V,
    d_embed=E,
    d_model=D,
    n_layers=3,
    n_heads=3,
    d_ff=31,
    max_positions=19,
    norm_eps=1e-2,
    generator=GeneratorSize(d_model=G, n_heads=2, n_layers=2, d_ff=14),
)
PAD, MASK, CLS, SEP = 0, 50, 51, 52
OBJECTIVE = ReplacedTokens(mask_id=MASK, cls_id=CLS, sep_id=SEP, vocab_size=50, rate=0.3)
B, S = 4, 13


def batch(padding: int = 0) -> dict[str, np.ndarray]:
    """Examples of random text, the last two rows with as much padding, so that rows count differently."""
    tokens = np.random.default_rng(0).integers(5, 50, (B, S + 1)).astype(np.int32)
    if padding:
        tokens[2:, S + 1 - 2 - padding :] = PAD
    return OBJECTIVE.examples({"tokens": tokens, "id": np.arange(B) + 3})


def build(model, params):
    return nnx.merge(abstract(model).graphdef, params)


@functools.partial(jax.jit, static_argnames=("model", "dtype"))
def both(params, tokens, valid, types, model=MODEL, dtype="float32"):
    """(word logits, log-odds) of the generator and the discriminator, both given the same tokens."""
    module = build(model, params)
    inputs = dict(dtype=dtype, valid=valid, token_types=types)
    return module.logits(module.generate(tokens, **inputs).hidden), module.replaced(module(tokens, **inputs).hidden)


# --- transformers -----------------------------------------------------------------------------------------------------


def encoder_map(ours: str, theirs: str, n_layers: int) -> dict[str, tuple[str, int | None]]:
    """Their tensor -> (our path, layer) of the layers and what comes before them."""
    out: dict[str, tuple[str, int | None]] = {
        f"{theirs}.embeddings_project.weight": (f"{ours}project.kernel", None),
        f"{theirs}.embeddings_project.bias": (f"{ours}project.bias", None),
    }
    parts = {"query": "attn.q", "key": "attn.k", "value": "attn.v"}
    names = {f"attention.self.{t}": o for t, o in parts.items()}
    names |= {"attention.output.dense": "attn.o", "intermediate.dense": "mlp.up", "output.dense": "mlp.down"}
    for i in range(n_layers):
        at = f"{theirs}.encoder.layer.{i}"
        for t, o in names.items():
            out |= {f"{at}.{t}.weight": (f"{ours}layers.{o}", i), f"{at}.{t}.bias": (f"{ours}layers.{o}_bias", i)}
        for t, o in {"attention.output.LayerNorm": "norm1", "output.LayerNorm": "norm2"}.items():
            out |= {f"{at}.{t}.weight": (f"{ours}layers.{o}.scale", i), f"{at}.{t}.bias": (f"{ours}layers.{o}.bias", i)}
    return out


SHARED = {
    "electra.embeddings.word_embeddings.weight": ("embed.table", None),
    "electra.embeddings.position_embeddings.weight": ("positions.table", None),
    "electra.embeddings.token_type_embeddings.weight": ("types.table", None),
    "electra.embeddings.LayerNorm.weight": ("norm.scale", None),
    "electra.embeddings.LayerNorm.bias": ("norm.bias", None),
}
GENERATOR = encoder_map("generator.", "electra", 2) | {
    "generator_predictions.LayerNorm.weight": ("generator.head.transform.norm.scale", None),
    "generator_predictions.LayerNorm.bias": ("generator.head.transform.norm.bias", None),
    "generator_predictions.dense.weight": ("generator.head.transform.dense.kernel", None),
    "generator_predictions.dense.bias": ("generator.head.transform.dense.bias", None),
    "generator_lm_head.bias": ("generator.head.bias", None),
}
DISCRIMINATOR = encoder_map("", "electra", 3) | {
    "discriminator_predictions.dense.weight": ("detector.dense.kernel", None),
    "discriminator_predictions.dense.bias": ("detector.dense.bias", None),
    "discriminator_predictions.dense_prediction.weight": ("detector.out.kernel", None),
    "discriminator_predictions.dense_prediction.bias": ("detector.out.bias", None),
}


def theirs_of(name: str, where: tuple[str, int | None], flat: dict) -> np.ndarray:
    """One of our arrays in the layout of torch, whose linear layers are [out, in]."""
    path, layer = where
    x = np.asarray(flat[path] if layer is None else flat[path][layer])
    if path.endswith(".table") or x.ndim == 1:
        return x
    if path.endswith("_bias"):
        return x.reshape(-1)
    return x.reshape(-1, x.shape[-1]).T if path.endswith("attn.o") else x.reshape(x.shape[0], -1).T


@pytest.fixture(scope="module")
def peers():
    """(torch, ElectraForMaskedLM, ElectraForPreTraining) with our random weights and one embedding between them."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = dict(vocab_size=V, embedding_size=E, max_position_embeddings=19, layer_norm_eps=1e-2)
    sizes |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager")
    wide = dict(hidden_size=D, num_hidden_layers=3, num_attention_heads=3, intermediate_size=31)
    narrow = dict(hidden_size=G, num_hidden_layers=2, num_attention_heads=2, intermediate_size=14)
    generator = transformers.ElectraForMaskedLM(transformers.ElectraConfig(**sizes, **narrow))
    discriminator = transformers.ElectraForPreTraining(transformers.ElectraConfig(**sizes, **wide))
    generator.electra.embeddings = discriminator.electra.embeddings
    generator.generator_lm_head.weight = discriminator.electra.embeddings.word_embeddings.weight
    flat = paths(random_params(MODEL))
    for peer, table in ((generator, SHARED | GENERATOR), (discriminator, SHARED | DISCRIMINATOR)):
        own = dict(peer.named_parameters())
        own.pop("generator_lm_head.weight", None)  # the table again
        assert own.keys() == table.keys()
        with torch.no_grad():
            for name, where in table.items():
                own[name].copy_(torch.from_numpy(theirs_of(name, where, flat).copy()))
    used = {path for table in (SHARED, GENERATOR, DISCRIMINATOR) for path, _ in table.values()}
    assert used == flat.keys()
    return torch, generator.eval(), discriminator.eval()


def as_torch(torch, x):
    return torch.from_numpy(np.array(x)).long()


@pytest.mark.hf
def test_logits_of_both_encoders_agree_with_transformers(peers):
    torch, generator, discriminator = peers
    rng = np.random.default_rng(1)
    tokens, types = rng.integers(0, V, (B, S)), rng.integers(0, 2, (B, S))
    valid = np.ones((B, S), bool)
    valid[1, 9:] = valid[3, 4:] = False
    inputs = dict(
        input_ids=as_torch(torch, tokens), token_type_ids=as_torch(torch, types), attention_mask=as_torch(torch, valid)
    )
    with torch.no_grad():
        expected = [peer(**inputs).logits.numpy() for peer in (generator, discriminator)]
    for ours, theirs in zip(both(random_params(MODEL), tokens, valid, types), expected, strict=True):
        assert_close(np.asarray(ours)[valid], theirs[valid])


def drawn_words(params, of: dict) -> np.ndarray:
    """The replacements of a batch, which both sides then are given."""
    module = build(MODEL, params)
    hidden = module.generate(of["tokens"], dtype=jnp.float32, valid=of["tokens"] != PAD).hidden
    head, own = module.head_fn()
    return np.asarray(sample(head, own, jnp.take_along_axis(hidden, of["positions"][..., None], axis=1), of["noise"]))


@pytest.mark.hf
@pytest.mark.parametrize("padding", slow_but([5], [0, 5]))
def test_losses_and_gradients_agree_with_transformers(peers, padding):
    torch, generator, discriminator = peers
    params, of = random_params(MODEL), batch(padding)
    valid, counted = of["tokens"] != PAD, of["weights"] > 0

    def total(params):
        loss = OBJECTIVE.loss(build(MODEL, params), of, dtype=jnp.float32, key=None)
        return loss.total / loss.weight, loss

    (mean, loss), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    original = np.asarray(filled(of["tokens"], of["positions"], of["targets"], of["weights"]))
    shown = np.asarray(filled(of["tokens"], of["positions"], drawn_words(params, of), of["weights"]))
    assert 0 < (shown != original).sum() <= counted.sum()
    asked = np.full((B, S), -100)
    for row in range(B):
        asked[row, of["positions"][row, counted[row]]] = of["targets"][row, counted[row]]
    mask = as_torch(torch, valid)
    words = generator(as_torch(torch, of["tokens"]), attention_mask=mask, labels=as_torch(torch, asked)).loss
    if padding:  # rows that count differently: by row, as the objective says
        logits = discriminator(as_torch(torch, shown), attention_mask=mask).logits
        wrong = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, as_torch(torch, shown != original).float(), reduction="none"
        )
        of_row = (wrong * mask).sum(1) / mask.sum(1)
        share = torch.from_numpy(counted.sum(axis=1) / counted.sum()).float()
        judged = (of_row * share).sum()
    else:
        labels = as_torch(torch, shown != original)
        judged = discriminator(as_torch(torch, shown), attention_mask=mask, labels=labels).loss
    assert_close(loss.nll / loss.weight, words.item())
    assert_close((mean - loss.nll / loss.weight) / 50, judged.item())
    assert_close(mean, (words + 50 * judged).item())

    generator.zero_grad(), discriminator.zero_grad()
    (words + 50 * judged).backward()
    flat = paths(grads)
    for peer, table in ((generator, SHARED | GENERATOR), (discriminator, DISCRIMINATOR)):
        own = dict(peer.named_parameters())
        for name, where in table.items():
            expected = own[name].grad.numpy()
            atol = 1e-4 * max(np.abs(expected).max(), 0.1)
            np.testing.assert_allclose(theirs_of(name, where, flat), expected, rtol=0, atol=atol, err_msg=name)


# The paper's table 6: generators of a quarter, a third and a quarter of the width.
SIZES = {
    "small": (dict(d_embed=128, d_model=256, n_heads=4), dict(d_model=64, n_heads=1)),
    "base": ({}, {}),
    "large": (dict(d_embed=1024, d_model=1024, n_layers=24, n_heads=16), dict(d_model=256, n_heads=4)),
}


@pytest.mark.hf
@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_two_models_of_transformers_less_one_embedding(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    changes, narrow = SIZES[name]
    model = dataclasses.replace(Electra(), **changes, generator=GeneratorSize(**narrow))
    sizes = dict(vocab_size=30522, embedding_size=model.d_embed, num_hidden_layers=model.n_layers)

    def peer(kind, d_model, n_heads):
        more = dict(hidden_size=d_model, num_attention_heads=n_heads, intermediate_size=4 * d_model)
        with torch.device("meta"):
            return kind(transformers.ElectraConfig(**sizes, **more))

    size = lambda module: sum(p.numel() for p in module.parameters())
    small = model.generator
    discriminator = peer(transformers.ElectraForPreTraining, model.d_model, model.n_heads)
    generator = peer(transformers.ElectraForMaskedLM, small.d_model, small.n_heads)
    expected = size(discriminator) + size(generator) - size(discriminator.electra.embeddings)
    assert count(abstract(model).infos) == expected


# --- what they share --------------------------------------------------------------------------------------------------


def test_what_both_read_is_a_parameter_once():
    flat = paths(abstract(MODEL).infos)
    own = {path.split(".")[1] for path in flat if path.startswith("generator.")}
    assert own == {"head", "layers", "project"}
    assert {path.split(".")[0] for path in flat} == {
        "detector", "embed", "generator", "layers", "norm", "positions", "project", "types"
    }  # fmt: skip
    assert "generator.head.table" not in flat
    assert flat["embed.table"].shape == (V, E) and flat["embed.table"].axes == ("vocab", "embed")
    assert flat["generator.layers.attn.q"].shape == (2, G, 2, 5) and flat["layers.attn.q"].shape == (3, D, 3, 7)


def test_an_untied_generator_has_a_table_of_its_own():
    tied, own = (paths(abstract(dataclasses.replace(MODEL, tied=t)).infos) for t in (True, False))
    assert own.keys() - tied.keys() == {"generator.head.table"}


def test_no_projection_where_the_widths_agree():
    flat = abstract(dataclasses.replace(MODEL, d_embed=D)).params
    assert "project" not in flat and "project" in flat["generator"]
    flat = abstract(dataclasses.replace(MODEL, d_embed=G)).params
    assert "project" in flat and "project" not in flat["generator"]


def test_a_change_of_the_generator_moves_its_words_alone_and_the_other_way_round():
    params, tokens, valid = random_params(MODEL), batch()["tokens"], np.ones((B, S), bool)
    before = both(params, tokens, valid, None)
    other = random_params(MODEL, seed=1)
    for changed, of_it, not_of_it in ((["generator"], 0, 1), (["layers", "project", "detector"], 1, 0)):
        after = both(params | {name: other[name] for name in changed}, tokens, valid, None)
        assert_equal(np.asarray(after[not_of_it]), np.asarray(before[not_of_it]))
        assert np.abs(np.asarray(after[of_it] - before[of_it])).max() > 0.1
    for shared in ("embed", "positions", "types", "norm"):
        after = both(params | {shared: other[shared]}, tokens, valid, None)
        assert all(np.abs(np.asarray(a - b)).max() > 0.01 for a, b in zip(after, before))


def test_padding_does_not_change_either():
    params, tokens = random_params(MODEL), batch(5)["tokens"]
    valid = tokens != PAD
    other = np.where(valid, tokens, 7).astype(np.int32)
    for a, b in zip(both(params, other, valid, None), both(params, tokens, valid, None)):
        assert_close(np.asarray(a)[valid], np.asarray(b)[valid])


def test_bfloat16_is_near_float32_and_gives_float32_logits():
    model = dataclasses.replace(MODEL, n_layers=2)
    inputs = (random_params(model), batch()["tokens"], np.ones((B, S), bool), None, model)
    low = both(*inputs, dtype="bfloat16")
    assert [x.dtype for x in low] == [jnp.float32, jnp.float32]
    assert_close(low, both(*inputs), "bfloat16")


@functools.partial(jax.jit, static_argnames="model")
def loss_and_gradient(model, params, key):
    """Of the mean over targets, with a detector that does not outweigh the generator."""
    objective, of = dataclasses.replace(OBJECTIVE, detector_weight=2.0), batch(3)

    def mean(params):
        loss = objective.loss(build(model, params), of, dtype=jnp.float32, key=key)
        return loss.total / loss.weight, loss.nll / loss.weight

    return jax.value_and_grad(mean, has_aux=True)(params)


DROPPING = dataclasses.replace(MODEL, n_layers=2, dropout=0.3)


@pytest.mark.slow
def test_gradients_do_not_depend_on_scan_or_remat():
    params, key = random_params(DROPPING), jax.random.key(1)
    unrolled = dataclasses.replace(DROPPING, compute=Compute(scan=False, remat="none"))
    assert_close(loss_and_gradient(unrolled, params, key), loss_and_gradient(DROPPING, params, key))


def test_a_key_decides_what_either_drops():
    params = random_params(DROPPING)
    once, again, other = (loss_and_gradient(DROPPING, params, jax.random.key(k))[0] for k in (1, 1, 2))
    assert once == again
    assert abs(once[1] - other[1]) > 0.01 and abs((once[0] - once[1]) - (other[0] - other[1])) > 0.01


# --- cost -------------------------------------------------------------------------------------------------------------


def test_flops_are_what_xla_counts():
    """But for the draw: the generator's head runs forward once more, at the places that are predicted."""
    s, d = 64, 320
    model = Electra(
        vocab_size=512, d_embed=d, d_model=d, n_layers=2, n_heads=4, max_positions=66,
        generator=GeneratorSize(d_model=192, n_heads=2, n_layers=3),
        compute=Compute(scan=False, remat="none", query_block=0),
    )  # fmt: skip
    objective = ReplacedTokens(mask_id=500, cls_id=501, sep_id=502, vocab_size=500)
    parts = abstract(model)

    def loss(params, batch):
        return objective.loss(nnx.merge(parts.graphdef, params), batch, dtype=jnp.float32, key=None).total

    found = jax.jit(jax.grad(loss)).lower(parts.params, objective.features(2, s)).cost_analysis()["flops"] / (2 * s)
    counted = flops_per_token(model, parts.infos, s, objective.row(s))
    p = objective.n_predictions(s)
    head = 2 * (192 * d + d * 512) * p / s
    assert 1.0 <= found / (counted.full + head) < 1.02
    assert counted.causal == counted.full


def test_flops_by_hand():
    s, p = 13, OBJECTIVE.n_predictions(13)
    flat = paths(abstract(MODEL).infos)
    size = lambda *names: sum(np.prod(i.shape) for path, i in flat.items() if path.startswith(names))
    everywhere = size("layers", "project", "detector", "norm", "generator.layers", "generator.project")
    predicted = size("generator.head", "embed")
    attention = 12 * s * s * (3 * 21 + 2 * 10)
    expected = (6 * (everywhere * s + predicted * p) + attention) / s
    assert flops_per_token(MODEL, abstract(MODEL).infos, s, OBJECTIVE.row(s)).full == pytest.approx(expected, rel=1e-12)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: GeneratorSize(d_model=10, n_heads=3), "model.generator.n_heads: expected a divisor of .* 10, got 3;"),
        (lambda: GeneratorSize(n_layers=0), "model.generator.n_layers: expected at least 1, got 0"),
        (lambda: GeneratorSize(d_ff=-1), "model.generator.d_ff: expected at least 1, got -1"),
        (lambda: dataclasses.replace(MODEL, d_embed=0), "model.d_embed: expected at least 1, got 0"),
        (lambda: dataclasses.replace(MODEL, n_heads=4), "model.n_heads: 4 does not divide model.d_model 21"),
        (
            lambda: abstract(dataclasses.replace(MODEL, task=LanguageModeling())),
            "model.task: expected MaskedLMAndReplaced for Electra, got LanguageModeling; take Bert",
        ),
    ],
)
def test_a_wrong_field_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        change()
