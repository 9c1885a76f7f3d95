"""Runs on corpora that were made with tokenizers of others."""

from __future__ import annotations

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

import lm
from lm import cli, convert
from lm.config import Config, Train, resolved
from lm.data import NO_PAD, Data, Stream, Text, open_corpus, prepare
from lm.data.inspect.preview import preview
from lm.data.stream.batches import BatchSchedule
from lm.data.tokenizer.huggingface import HFTokenizer
from lm.data.tokenizer.slow import load_folder
from lm.errors import UserError
from lm.models import GPT2, Bert
from lm.nn.param import paths
from lm.objectives import CausalLM, MaskedLM
from lm.optim import AdamW
from lm.training import train as training_train
from tests.models.reference import random_params

END = "<|endoftext|>"
rng = random.Random(3)
WORDS = ["".join(rng.choices("etaoinsé", k=rng.randint(1, 6))) for _ in range(40)]
TEXTS = [f"{i} {' '.join(rng.choices(WORDS, k=rng.randint(4, 30)))}" + f"\n{END}x" * (i % 5 == 0) for i in range(50)]


def byte_level(folder) -> str:
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS, vocab_size=291, special_tokens=[END, "<s>"], show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return str(folder)


def word_piece(folder) -> str:
    tokenizer = tokenizers.BertWordPieceTokenizer()
    tokenizer.train_from_iterator(TEXTS, vocab_size=103, show_progress=False)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return str(folder)


def data_in(folder, tokenizer, **kw) -> Data:
    """Of two sources."""
    for i, text in enumerate(TEXTS):
        path = folder / f"raw/{'ab'[i % 2]}/{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    sources = {name: Text(glob=f"{folder}/raw/{name}/*.txt") for name in "ab"}
    kw = {"validation_fraction": 0.2, "seq_len": 23, "batch_size": 8, "workers": 1} | kw
    return Data(path=f"{folder}/corpus", sources=sources, tokenizer=tokenizer, **kw)


def config(data, model, objective, **train) -> Config:
    return Config(
        model=model, data=data, objective=objective, optim=AdamW(lr=0.01), train=Train(**{"steps": 2} | train)
    )


GPT = GPT2(vocab_size=291, d_model=16, n_layers=1, n_heads=2, max_positions=64)
GPT_IDS = CausalLM(start_id=0, pad_id=NO_PAD)


@pytest.fixture(scope="module")
def gpt2_run(tmp_path_factory):
    """(folder, its data, how training ended)."""
    folder = tmp_path_factory.mktemp("gpt2")
    data = data_in(folder, byte_level(folder / "tok"), packing="best_fit")
    return folder, data, training_train.train(resolved(config(data, GPT, GPT_IDS)), folder / "run")


def test_a_gpt2_is_trained_and_evaluated_on_rows_of_a_byte_level_tokenizer(gpt2_run):
    _, data, result = gpt2_run
    corpus = open_corpus(data)
    shown = preview(Stream.of(data, corpus), corpus.tokenizer, GPT_IDS, step=0, ramp=BatchSchedule.of(data), rows=8)
    assert "<pad>" in shown and f"{END}x" in shown.replace("\n  | ", "\n") and f"  | {END}" in shown
    for name, store in corpus.validation.items():
        found = result.evaluation[name]
        assert (found.tokens, found.n_bytes) == (store.n_tokens - 1, store.n_bytes)  # ends of documents are targets


def test_a_run_of_such_a_tokenizer_generates_and_becomes_a_folder(gpt2_run, tmp_path):
    folder, data, _ = gpt2_run
    run = lm.restore(folder / "run")
    assert isinstance(run.tokenizer, HFTokenizer) and run.tokenizer.literal
    assert 0 not in run.tokenizer.encode(f"a{END}")
    assert len(lm.generate(run, ["e", ""], max_new_tokens=3)) == 2
    assert convert.export_hf(folder / "run", tmp_path / "out") == "GPT2LMHeadModel"
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"]) == (0, None)
    assert load_folder(tmp_path / "out").encode("e t") == run.tokenizer.encode("e t")


def test_the_commands_read_a_corpus_of_such_a_tokenizer(gpt2_run, capsys):
    folder, data, _ = gpt2_run
    for argv in (["eval", f"{folder}/run"], ["data", "stats", data.path], ["data", "verify", data.path]):
        with pytest.raises(SystemExit) as e:
            cli.main(argv)
        assert e.value.code == 0, capsys.readouterr()
    assert "xz -9" in capsys.readouterr().out


def test_a_bert_is_trained_with_its_own_special_tokens_and_whole_words(tmp_path):
    data = data_in(tmp_path, word_piece(tmp_path / "tok"))
    ids = load_folder(data.tokenizer).ids
    objective = MaskedLM(
        start_id=ids["sep"], pad_id=ids["pad"], cls_id=ids["cls"], sep_id=ids["sep"], mask_id=ids["mask"],
        vocab_size=103, whole_word=True, newline_id=3, mask_share=0.0, random_share=1.0, rate=0.5,
    )  # fmt: skip
    corpus = prepare(data, progress=False, log=lambda line: None)
    rows = {"tokens": Stream.of(data, corpus).rows(np.arange(64)), "id": np.arange(64)}
    before, after = rows["tokens"].copy(), objective.examples_for(corpus.tokenizer)(rows)
    special = [ids[role] for role in ("pad", "cls", "sep", "mask")]
    assert (after["tokens"][:, 1:-1] == ids["sep"]).sum() == (before[:, :-3] == ids["sep"]).sum()
    picked = after["weights"] > 0
    drawn = np.take_along_axis(after["tokens"], after["positions"], axis=1)[picked]
    assert len(np.unique(drawn)) > 80 and drawn.max() == 102
    assert not np.isin(drawn, special).any() and not np.isin(after["targets"][picked], special).any()
    goes_on = [piece.startswith("##") for piece in corpus.tokenizer.pieces(range(103))]
    was = before[:, :-2]  # shifted by [CLS]
    for row, (places, weights) in enumerate(zip(after["positions"], after["weights"])):
        chosen = set(places[weights > 0].tolist())
        for place in sorted(chosen):
            if place < 21 and goes_on[was[row, place]]:  # the piece after it
                assert place + 1 in chosen or len(chosen) < 3
    model = Bert(vocab_size=107, d_model=16, n_layers=1, n_heads=2, max_positions=32)
    assert training_train.train(resolved(config(data, model, objective)), tmp_path / "run").step == 2


def test_no_padding_is_worth_as_much_as_an_id_of_its_own():
    """The same rows, padded with -1 and with an id that no text has: loss, gradients and score are bit-equal."""
    module = nnx.merge(nnx.split(GPT.build(nnx.Rngs(0)))[0], random_params(GPT))
    tokens = np.random.default_rng(0).integers(1, 280, (3, 24)).astype(np.int32)
    tokens[:, [5, 11]] = 0
    found = []
    for pad_id in (NO_PAD, 290):
        tokens[0, 17:] = tokens[1, 6:11] = tokens[2] = pad_id
        tokens[2, :2] = 0, 7
        objective = CausalLM(start_id=0, pad_id=pad_id, z_loss=0.1, label_smoothing=0.1)
        graph, params = nnx.split(module)

        def both(params, objective=objective, graph=graph):
            module = nnx.merge(graph, params)
            loss = objective.loss(module, {"tokens": tokens}, dtype=jnp.float32, key=None)
            return loss.total, (loss, objective.score(module, {"tokens": tokens}, jnp.full(291, 5), dtype=jnp.float32))

        (_, sums), gradient = jax.jit(jax.value_and_grad(both, has_aux=True))(params)
        found.append(jax.tree.map(np.asarray, (*sums, nnx.to_pure_dict(gradient))))
    text = tokens != pad_id
    assert np.isfinite(found[0][0].total) and found[0][1].weight.sum() == (text[:, 1:] & text[:, :-1]).sum() == 34
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_mistakes_are_refused_before_a_corpus_is_made(tmp_path):
    tok = byte_level(tmp_path / "tok")

    def refused(model, objective, match, tokenizer=tok):
        with pytest.raises(UserError, match=match):
            training_train.train(resolved(config(data_in(tmp_path, tokenizer), model, objective)), tmp_path / "run")
        assert not (tmp_path / "corpus").exists()

    small = dataclasses.replace(GPT, vocab_size=290)
    refused(small, GPT_IDS, "model.vocab_size: 290 is smaller than the tokenizer's 291")
    refused(GPT, CausalLM(start_id=0, pad_id=0), r"objective.pad_id: .* -1, as it has no padding, got 0; set it to -1")
    refused(GPT, CausalLM(start_id=1, pad_id=NO_PAD), "objective.start_id: the tokenizer says 0, got 1")
    bert = Bert(vocab_size=103, d_model=16, n_layers=1, n_heads=2, max_positions=32)
    objective = MaskedLM(start_id=3, pad_id=0, cls_id=2, sep_id=3, mask_id=90, vocab_size=103)
    refused(bert, objective, "objective.mask_id: expected an id that .* got 90, which is ", word_piece(tmp_path / "w"))


@pytest.mark.hf
def test_an_imported_llama_goes_on_with_its_own_tokenizer(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    source = tmp_path / "source"
    byte_level(source)
    roles = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": END}
    (source / "tokenizer_config.json").write_text(json.dumps(roles))
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=291, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(settings)
    model.save_pretrained(source)
    convert.import_hf(source, tmp_path / "imported")
    imported = lm.restore(tmp_path / "imported")
    assert not imported.tokenizer.literal and imported.config.objective == GPT_IDS
    data = data_in(tmp_path, str(tmp_path / "imported"))
    run = config(
        data, imported.config.model, imported.config.objective, init_from=str(tmp_path / "imported"), log_every=1
    )
    training_train.train(resolved(run), tmp_path / "run")
    corpus = open_corpus(data)
    assert corpus.tokenizer.fingerprint == imported.tokenizer.fingerprint
    assert open_corpus(dataclasses.replace(data, tokenizer=str(source))).fingerprint == corpus.fingerprint
    rows = torch.from_numpy(Stream.of(data, corpus).rows(np.arange(8)).astype(np.int64))
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    positions = torch.from_numpy(_positions(rows[:, :-1].numpy()))
    mask = torch.from_numpy(_documents(rows[:, :-1].numpy()))
    with torch.no_grad():
        logits = model(rows[:, :-1], position_ids=positions, attention_mask=mask[:, None]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    np.testing.assert_allclose(first["loss"], float(expected), rtol=1e-4)
    convert.export_hf(tmp_path / "run", tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("e t o", add_special_tokens=False).input_ids == corpus.tokenizer.encode("e t o")
    trained = dict(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert any((trained[name] != x).any() for name, x in model.named_parameters())
    assert paths(lm.restore(tmp_path / "run").params).keys() == paths(imported.params).keys()


def _positions(inputs: np.ndarray) -> np.ndarray:
    index = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape)
    return index - np.maximum.accumulate(np.where(inputs == 0, index, 0), axis=1)


def _documents(inputs: np.ndarray) -> np.ndarray:
    """Float32 [B,S,S] to be added to the scores: minus much where a token may not look."""
    document = np.cumsum(inputs == 0, axis=1)
    seen = (document[:, :, None] == document[:, None]) & np.tri(inputs.shape[1], dtype=bool)
    return np.where(seen, 0, -1e30).astype(np.float32)
