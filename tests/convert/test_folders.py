"""Folders become runs and runs become folders: nothing is lost, nothing half-made stays, and runs start from them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lm
from lm import cli, convert, hf
from lm import workdir as lm_workdir
from lm.checkpoint import Checkpoints, Meta
from lm.config import Config, Train, resolved
from lm.convert import folders
from lm.data import Stream, Tokenizer, open_corpus
from lm.errors import UserError
from lm.hf import weights
from lm.mesh import Mesh
from lm.models import GPT2, T5, Bart, Bert, Llama, MaskedLMAndPair, Mixtral, Transformer
from lm.nn.param import paths
from lm.objectives import CausalLM, Denoising, MaskedLM, Seq2Seq, SpanCorruption
from lm.optim import AdamW
from lm.training import start as training_start
from lm.training import train
from lm.training.setup import Setup
from tests.halves import slow_but
from tests.hf.cases import CASES, reference
from tests.hf.conftest import cases  # noqa: F401
from tests.models.reference import random_params
from tests.training.conftest import VOCAB_SIZE, corpus  # noqa: F401

pytestmark = pytest.mark.hf
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")

DTYPES = ("float32", "bfloat16", "float16")
# One of each kind of layout and task; the others of the matrix go the same ways.
FEW = """gpt2 | gpt_neox | opt post-norm | llama token labels | gemma3 | mixtral | bert untied | albert groups |
t5 gated | mbart"""
CHOSEN = slow_but(FEW.replace("\n", " ").split(" | "), CASES)


@pytest.fixture(scope="module")
def folder(cases):  # noqa: F811
    """name, dtype -> the folder that transformers writes of a case; not to be changed."""
    return cases.folder


def copied(source: Path, target: Path, **fields) -> Path:
    """A folder of its own, with fields of its config.json replaced, or taken out where they are None."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def saved(model, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def tensors(path: Path) -> dict:
    return {name: x for file in path.glob("*.safetensors") for name, x in safetensors.load_file(file).items()}


def assert_bit_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(x, b[name]), name


def loads_quietly(cls, path: Path, caplog):
    transformers.utils.logging.enable_propagation()
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = cls.from_pretrained(path, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")], caplog.text
    return model.eval()


def command(capsys, *argv: str | Path) -> tuple[object, str, str]:
    capsys.readouterr()  # what transformers prints when it saves
    with pytest.raises(SystemExit) as e:
        cli.main([str(a) for a in argv])
    return e.value.code, *capsys.readouterr()


def refusal(capsys, *argv: str | Path) -> str:
    """The one line that a command ends with."""
    code, out, err = command(capsys, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err


# --- folder -> run -> folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOSEN)
def test_a_folder_comes_back_bit_equal_from_the_run_alone(name, folder, tmp_path):
    dtype = DTYPES[list(CASES).index(name) % 3]
    source = shutil.copytree(folder(name, dtype), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    before = tensors(source)
    convert.import_hf(source, tmp_path / "run")
    shutil.rmtree(source)
    convert.export_hf(tmp_path / "run", tmp_path / "out")
    assert_bit_equal(before, tensors(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_the_commands_do_it_and_say_what_they_did(folder, tmp_path, capsys):
    code, out, _ = command(capsys, "import-hf", folder("llama"), tmp_path / "run", "train.seed=5")
    assert code == 0 and f"Llama {sum(x.numel() for x in reference('llama').parameters()):,} parameters" in out
    assert out.endswith(f"go on from it with: lm train RECIPE --workdir NEW train.init_from={tmp_path / 'run'}\n")
    assert lm.restore(tmp_path / "run").config.train.seed == 5
    code, out, _ = command(capsys, "export-hf", tmp_path / "run", tmp_path / "out", "--step", "0", "--dtype", "float16")
    assert code == 0 and "LlamaForCausalLM.from_pretrained" in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    expected = {name: x.half() for name, x in tensors(folder("llama")).items()}
    assert_bit_equal(expected, tensors(tmp_path / "out"))
    assert "expected a new or empty folder" in refusal(capsys, "export-hf", tmp_path / "run", tmp_path / "out")
    assert command(capsys, "export-hf", tmp_path / "run", tmp_path / "out", "--overwrite")[0] == 0
    assert_bit_equal(tensors(folder("llama")), tensors(tmp_path / "out"))


def test_each_tensor_keeps_its_own_dtype(folder, tmp_path):
    source = shutil.copytree(folder("llama"), tmp_path / "source")
    mixed = {n: x.bfloat16() if n.endswith("proj.weight") else x for n, x in tensors(source).items()}
    safetensors.save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    convert.import_hf(source, tmp_path / "run")
    convert.export_hf(tmp_path / "run", tmp_path / "out")
    assert_bit_equal(mixed, tensors(tmp_path / "out"))


@pytest.mark.parametrize("on_host", [True, False])
def test_a_run_restores_the_weights_where_its_mesh_has_them(tmp_path, monkeypatch, on_host):
    """Arrays that are put together on the host, and those that are filled on the devices."""
    if not on_host:
        monkeypatch.setattr(weights, "HOST_BYTES", 0)
    config = transformers.LlamaConfig(
        vocab_size=98, hidden_size=24, intermediate_size=42, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10,
    )  # fmt: skip
    source = saved(transformers.LlamaForCausalLM(config).bfloat16(), tmp_path / "source")
    convert.import_hf(source, tmp_path / "run", ["mesh.fsdp=4", "mesh.tensor=2"])
    convert.export_hf(tmp_path / "run", tmp_path / "out")
    assert_bit_equal(tensors(source), tensors(tmp_path / "out"))
    monkeypatch.undo()
    expected = paths(hf.load(source).params)
    for run in (lm.restore(tmp_path / "run"), lm.restore(tmp_path / "run", overrides=["mesh.fsdp=2", "mesh.data=2"])):
        for path, leaf in paths(run.params).items():
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, expected[path][shard.index], err_msg=path)
    run = lm.restore(tmp_path / "run")
    per_device = {path: leaf.addressable_shards[0].data.shape for path, leaf in paths(run.params).items()}
    assert per_device["layers.attn.q"] == (3, 24 // 4, 4 // 2, 10)
    assert per_device["layers.mlp.down"] == (3, 42 // 2, 24 // 4)
    assert per_device["embed.table"] == (98 // 2, 24 // 4)


@pytest.mark.parametrize(
    "name, fields",
    [
        ("gpt2", {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}),
        ("bert masked lm", {"pad_token_id": None}),
        ("t5", {"eos_token_id": None, "decoder_start_token_id": None}),
        ("bart", {"eos_token_id": None, "bos_token_id": None, "decoder_start_token_id": None}),
        ("marian", {"eos_token_id": None, "decoder_start_token_id": None, "forced_eos_token_id": None}),
    ],
)
def test_ids_that_a_folder_does_not_name_are_filled_in(name, fields, folder, tmp_path):
    source = copied(folder(name), tmp_path / "source", **fields)
    (source / "generation_config.json").unlink(missing_ok=True)
    convert.import_hf(source, tmp_path / "run")
    assert_bit_equal(tensors(source), tensors(out_of(tmp_path / "run", tmp_path / "out")))


def out_of(run: Path, target: Path) -> Path:
    convert.export_hf(run, target)
    return target


@pytest.mark.parametrize("vocab_size", slow_but([5], [2, 5, 7]))
@pytest.mark.parametrize("name", ["gpt2", "bert masked lm", "t5", "bart", "marian"])
def test_a_vocabulary_without_room_for_special_ids_is_taken_or_refused_in_one_line(name, vocab_size, tmp_path, capsys):
    case = CASES[name]
    ids = {k: 0 for k in case.fields if k.endswith("token_id")} | {"pad_token_id": 1}
    more = {"decoder_vocab_size": vocab_size} if "decoder_vocab_size" in case.fields else {}
    config = getattr(transformers, case.config)(**case.fields | ids | more | {"vocab_size": vocab_size})
    source = saved(getattr(transformers, case.cls)(config), tmp_path / "source")
    code, _, err = command(capsys, "import-hf", source, tmp_path / "run")
    if code == 0:
        assert_bit_equal(tensors(source), tensors(out_of(tmp_path / "run", tmp_path / "out")))
    else:
        assert (code, err.count("\n")) == (2, 1), err
        assert "vocab_size: expected" in err
        assert vocab_size < 7 and name != "gpt2"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


# --- text -------------------------------------------------------------------------------------------------------------

LINES = ["the cat sat on the mat. ", "a dog, a cat, a mat: the end! ", "naïve grösse ", "def f(x):\n    return x\n"] * 9


def byte_level() -> tokenizers.Tokenizer:
    out = tokenizers.Tokenizer(tokenizers.models.BPE())
    out.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    out.train_from_iterator(LINES, trainer)
    return out


def spaced_with_start() -> tokenizers.Tokenizer:
    """As LLaMA's: a space before the text that decoding takes away again, and <s> in front."""
    out = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    out.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    steps = tokenizers.decoders
    out.decoder = steps.Sequence([steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=specials[:3], show_progress=False)
    out.train_from_iterator(LINES, trainer)
    out.post_processor = tokenizers.processors.TemplateProcessing(
        single=["<s>", "$A"], pair=["<s>", "$A", "<s>", "$B"], special_tokens=[("<s>", 1)]
    )
    return out


TEXT_MODELS = {
    "gpt2": (byte_level, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, {"eos": 0, "bos": 0}),
    "llama": (spaced_with_start, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, {"eos": 2, "bos": 1}),
}


SEARCHES = [
    (("--temperature", "0"), {}),
    (("--beams", "4", "--length-penalty", "0.6"), {"num_beams": 4, "length_penalty": 0.6}),
]


def assert_same_text(capsys, model, tokenizer, run: Path, **options) -> None:
    """`lm generate` on an imported run prints what transformers generates, greedily and with beams."""
    texts, ends = set(), model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else []
    for arguments, theirs in SEARCHES:
        for prompt in ("the cat", "x") if "--temperature" in arguments else ("the cat",):
            encoded = tokenizer(prompt, return_tensors="pt")
            encoded.pop("token_type_ids", None)
            ids = model.generate(**encoded, max_new_tokens=9, do_sample=False, **theirs, **options)[0].tolist()
            ids = ids[:-1] if ids[-1] in ends else ids  # some are text
            code, out, _ = command(capsys, "generate", run, prompt, *arguments, "--max-new-tokens", "9")
            assert code == 0
            assert out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
            texts.add(out)
    assert len(texts) > 1


def spaced_with_end() -> tokenizers.Tokenizer:
    """As T5's: </s> after the text."""
    out = spaced_with_start()
    out.post_processor = tokenizers.processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 2)]
    )
    return out


READERS = {
    "t5": {"num_decoder_layers": 2, "decoder_start_token_id": 1, "pad_token_id": 1},
    "marian": {"decoder_start_token_id": 1, "pad_token_id": 1, "forced_eos_token_id": 2, "bad_words_ids": [[1]]},
}


@pytest.mark.parametrize("name", slow_but(["t5"], READERS))
def test_text_of_an_encoder_decoder_is_that_of_transformers(name, tmp_path, capsys):
    raw = spaced_with_end()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", pad_token="<s>"
    )
    case = CASES[name]
    vocab_size = raw.get_vocab_size()
    sizes = (
        {"vocab_size": vocab_size, "decoder_vocab_size": vocab_size} if name == "marian" else {"vocab_size": vocab_size}
    )
    config = getattr(transformers, case.config)(**case.fields | READERS[name] | sizes | {"eos_token_id": 2})
    torch.manual_seed(3)
    model = getattr(transformers, case.cls)(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn(x.shape) * 0.2)
    # Many ends, as chat models have them, of which the last are likely; in the Marian fewer, or nothing is written.
    n_ends = 5 if name == "marian" else 40
    model.generation_config.eos_token_id = [2, *range(vocab_size - n_ends, vocab_size)]
    source = saved(model, tmp_path / "source")
    tokenizer.save_pretrained(source)
    convert.import_hf(source, tmp_path / "run")
    assert_same_text(capsys, model, tokenizer, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MarianMTModel", "T5ForConditionalGeneration"])
def test_a_trained_encoder_decoder_writes_what_its_folder_does(name, corpus, tmp_path, capsys):  # noqa: F811
    """By transformers, which reads the same ids; padding and ids of no text are never written."""
    tokenizer = trained(name, corpus, tmp_path / "run")
    convert.export_hf(tmp_path / "run", tmp_path / "out")
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "out").eval()
    never = [tokenizer.pad_id, *range(V, V + 6)]
    for arguments, options in SEARCHES:
        for text in ("def f(x):",):
            ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_id]])
            options = options | {"suppress_tokens": never, "forced_eos_token_id": None, "max_new_tokens": 9}
            expected = theirs.generate(ids, do_sample=False, **options)[0].tolist()[1:]
            code, out, _ = command(capsys, "generate", tmp_path / "run", text, *arguments, "--max-new-tokens", "9")
            assert (code, out) == (0, tokenizer.decode([i for i in expected if i != tokenizer.eos_id]) + "\n")
    run = lm.restore(tmp_path / "run")
    assert lm.generate(run, text, max_new_tokens=9, beams=4, length_penalty=0.6) == [out.removesuffix("\n")]
    drawn = lm.generate(run, [text] * 3, max_new_tokens=9, seed=5)
    assert len(set(drawn)) > 1 and drawn == lm.generate(run, [text] * 3, max_new_tokens=9, seed=5)


@pytest.mark.parametrize("name", slow_but(["llama"], TEXT_MODELS))
def test_generated_text_is_that_of_transformers(name, tmp_path, capsys):
    make, roles, ids = TEXT_MODELS[name]
    raw = make()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **roles)
    case = CASES[name]
    ids = {f"{role}_token_id": i for role, i in ids.items()} | {"pad_token_id": None}
    fields = case.fields | ids | {"vocab_size": raw.get_vocab_size()}
    torch.manual_seed(3)
    model = getattr(transformers, case.cls)(getattr(transformers, case.config)(**fields)).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn(x.shape) * 0.2)
    source = saved(model, tmp_path / "source")
    tokenizer.save_pretrained(source)
    _, out, _ = command(capsys, "import-hf", source, tmp_path / "run")
    assert out.endswith(f"train.init_from={tmp_path / 'run'} data.tokenizer={tmp_path / 'run'}\n")
    assert_same_text(capsys, model, tokenizer, tmp_path / "run", pad_token_id=ids["eos_token_id"])
    convert.export_hf(tmp_path / "run", tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [again(t).input_ids for t in LINES[:4]] == [tokenizer(t).input_ids for t in LINES[:4]]


def test_a_run_without_a_tokenizer_says_so_where_it_needs_one(folder, tmp_path, capsys):
    convert.import_hf(folder("llama"), tmp_path / "run")
    assert "had no tokenizer" in refusal(capsys, "generate", tmp_path / "run", "x")
    convert.import_hf(folder("t5"), tmp_path / "t5")
    assert "had no tokenizer" in refusal(capsys, "generate", tmp_path / "t5", "x")
    convert.import_hf(folder("bert"), tmp_path / "bert")
    message = "expected a decoder or an encoder-decoder of words, got Bert for MaskedLMAndPair; it writes no text"
    assert message in refusal(capsys, "generate", tmp_path / "bert", "x")


# --- a run that was trained here -> folder ----------------------------------------------------------------------------

SMALL = {"vocab_size": VOCAB_SIZE + 6, "d_model": 24, "n_layers": 3, "n_heads": 4}
V = VOCAB_SIZE
TRAINED = {
    "GPT2LMHeadModel": (GPT2(**SMALL, max_positions=32), CausalLM()),
    "LlamaForCausalLM": (Llama(**SMALL, n_kv_heads=2, d_ff=41), CausalLM()),
    "MixtralForCausalLM": (
        Mixtral(**SMALL, n_kv_heads=2, d_ff=41, n_experts=3, top_k=2),
        CausalLM(router_balance=0.03),
    ),
    "BertForPreTraining": (
        Bert(**SMALL, max_positions=32, task=MaskedLMAndPair()),
        MaskedLM(mask_id=V, cls_id=V + 1, sep_id=V + 2, vocab_size=V),
    ),
    "BertForMaskedLM": (
        Bert(**SMALL, max_positions=32, tied=False),
        MaskedLM(mask_id=V, cls_id=V + 1, sep_id=V + 2, vocab_size=V),
    ),
    "T5ForConditionalGeneration": (
        T5(**SMALL, d_ff=41, head_dim=10),
        SpanCorruption(first_sentinel_id=V + 5, n_sentinels=6),
    ),
    "BartForConditionalGeneration": (Bart(**SMALL, d_ff=41, max_positions=32), Denoising(mask_id=V)),
    "MarianMTModel": (Transformer(**SMALL, d_ff=41), Seq2Seq(max_source=16, max_target=16)),
}


def trained(name: str, data, workdir: Path) -> Tokenizer:
    """A run as training leaves it: random weights at step 7, and other ones as their moving average."""
    model, objective = TRAINED[name]
    config = Config(
        model=dataclasses.replace(model, dropout=0.0),
        data=data,
        objective=objective,
        optim=AdamW(lr=0.01, ema_decay=0.9),
        train=Train(steps=9),
        mesh=Mesh(),
    )
    setup = Setup.make(config, lm.run.make_mesh(Mesh(), jax.devices()[:1]))
    state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), setup.abstract_state)
    shardings = jax.tree.map(lambda a: a.sharding, setup.abstract_state.params)
    params, ema = (jax.device_put(random_params(config.model, seed), shardings) for seed in (5, 6))
    state = state._replace(params=params, ema=ema)
    tokenizer = open_corpus(data).tokenizer
    meta = Meta(resolved(config).to_json(), tokenizer.to_bytes(), 0, {}, lm_workdir.versions())
    checkpoints = Checkpoints(workdir, config.checkpoint)
    checkpoints.save(7, state, meta)
    checkpoints.close()
    return tokenizer


@pytest.mark.parametrize(
    "name", slow_but(["LlamaForCausalLM", "BertForPreTraining", "BartForConditionalGeneration"], TRAINED)
)
def test_a_trained_run_is_a_folder_of_transformers_with_its_logits_and_ids(name, corpus, tmp_path, caplog):  # noqa: F811
    tokenizer = trained(name, corpus, tmp_path / "run")
    assert convert.export_hf(tmp_path / "run", tmp_path / "out") == name
    theirs = loads_quietly(getattr(transformers, name), tmp_path / "out", caplog)
    theirs.config._experts_implementation = "eager"
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(4, V, (3, 11)), rng.integers(4, V, (3, 7))
    run = lm.restore(tmp_path / "run")
    module = nnx.merge(run.setup.graphdef, random_params(run.config.model, 6))
    both = run.config.model.family == "encoder_decoder"
    out = module(ids, targets, dtype=jnp.float32) if both else module(ids, dtype=jnp.float32)
    batch = {"input_ids": torch.from_numpy(ids)} | ({"decoder_input_ids": torch.from_numpy(targets)} if both else {})
    with torch.no_grad():
        result = theirs(**batch)
    logits = result.prediction_logits if "prediction_logits" in result else result.logits
    np.testing.assert_allclose(module.logits(out.hidden), logits.numpy(), rtol=0, atol=2e-4)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (*LINES[:4], "etaoin  shrdlu\n\n</s> ▁", ""):
        assert auto(text).input_ids == tokenizer.encode(text)
    if name in ("GPT2LMHeadModel", "BartForConditionalGeneration"):
        assert theirs.generation_config.eos_token_id == tokenizer.eos_id
        again = hf.load(tmp_path / "out")
        ours = again.generate(input_ids=ids, max_new_tokens=6)
        np.testing.assert_array_equal(ours, theirs.generate(torch.from_numpy(ids), max_new_tokens=6).numpy())


# --- runs that start from an import -----------------------------------------------------------------------------------


@pytest.fixture
def start(corpus, tmp_path):  # noqa: F811
    """(the torch model, an import of it, the config of a run that starts from it)."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, rms_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn(x.shape) * 0.1)
    convert.import_hf(saved(model, tmp_path / "source"), tmp_path / "imported")
    return (
        model,
        tmp_path / "imported",
        Config(
            model=dataclasses.replace(lm.restore(tmp_path / "imported").config.model, dropout=0.0),
            data=corpus,
            objective=CausalLM(document_mask=False),
            optim=AdamW(lr=0.01, ema_decay=0.9),
            train=Train(steps=2, log_every=1, init_from=str(tmp_path / "imported")),
        ),
    )


def losses(workdir: Path) -> list[float]:
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [r["loss"] for r in records if r["kind"] == "train"]


@pytest.mark.slow
def test_a_run_starts_from_an_import_and_resumes_from_itself(start, tmp_path):
    model, _, config = start
    train.train(resolved(config), tmp_path / "run")
    stream = Stream(open_corpus(config.data).train, weights=None, seq_len=config.data.seq_len, seed=config.data.seed)
    rows = torch.from_numpy(stream.rows(np.arange(config.data.batch_size)).astype(np.int64))
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=0)
    np.testing.assert_allclose(losses(tmp_path / "run")[0], float(expected), rtol=1e-5)
    shutil.rmtree(tmp_path / "imported")
    train.train(resolved(dataclasses.replace(config, train=Train(steps=3, log_every=1))), tmp_path / "run")
    assert lm.restore(tmp_path / "run").step == 3
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3


def test_a_run_that_starts_from_weights_has_an_optimizer_and_a_step_of_its_own(start):
    _, workdir, config = start
    setup = Setup.make(config, lm.run.make_mesh(Mesh()))
    state = training_start.initial_state(config, setup)
    imported = lm.restore(workdir).params
    for part in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, part, imported)
    assert not any(a is b for a, b in zip(*map(jax.tree.leaves, (state.params, state.ema)), strict=True))
    fresh = setup.init()
    jax.tree.map(np.testing.assert_array_equal, (state.step, state.opt), (fresh.step, fresh.opt))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), state, setup.abstract_state)


def test_weights_that_do_not_fit_are_refused_with_what_does_not(start, tmp_path):
    _, workdir, config = start
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=32))
    with pytest.raises(UserError, match=r"train.init_from: .*down is \(2, 24, 16\) here, expected \(2, 32, 16\)") as e:
        train.train(resolved(wide), tmp_path / "run")
    assert "set model to" in str(e.value) and "\n" not in str(e.value)
    nowhere = dataclasses.replace(config.train, init_from=str(tmp_path / "no"))
    unprepared = dataclasses.replace(config.data, path=str(tmp_path / "unprepared"))
    with pytest.raises(UserError, match="train.init_from: .*no: expected the folder of a run"):
        train.train(resolved(dataclasses.replace(config, data=unprepared, train=nowhere)), tmp_path / "run2")
    assert not (tmp_path / "unprepared").exists()


def test_an_imported_model_is_not_resumed(start):
    _, workdir, config = start
    before = sorted(p.name for p in workdir.iterdir())
    with pytest.raises(UserError, match=f"{workdir}: expected a new folder .*train.init_from={workdir}"):
        train.train(resolved(config), workdir)
    assert sorted(p.name for p in workdir.iterdir()) == before


# --- refused, and stopped half-way ------------------------------------------------------------------------------------


def test_only_a_new_folder_becomes_a_run(folder, tmp_path, capsys):
    convert.import_hf(folder("llama"), tmp_path / "run")
    assert "got one with a run in it" in refusal(capsys, "import-hf", folder("llama"), tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert "got one with files in it" in refusal(capsys, "import-hf", folder("llama"), tmp_path / "mine")
    assert "got a file" in refusal(capsys, "import-hf", folder("llama"), tmp_path / "mine" / "notes.txt")
    (tmp_path / "empty").mkdir()
    convert.import_hf(folder("llama"), tmp_path / "empty")
    assert lm.restore(tmp_path / "empty").step == 0


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.d_model=32", "model.d_model: expected the folder's 24, got 32"),
        ("model.d_modle=32", "did you mean 'd_model'"),
        ("mesh.data=16", "does not fit 8 devices"),
        ("mesh.tensor=8", "is not divisible by mesh axis tensor=8"),
        ("objective=MaskedLM(mask_id=5,cls_id=6,sep_id=7,vocab_size=97)", "is for models of the family encoder"),
    ],
)
def test_an_override_that_does_not_fit_is_refused_and_leaves_nothing(override, message, folder, tmp_path, capsys):
    assert message in refusal(capsys, "import-hf", folder("llama"), tmp_path / "run", override)
    assert not list(tmp_path.iterdir())


def test_how_a_model_runs_may_be_set(folder, tmp_path):
    convert.import_hf(
        folder("llama"), tmp_path / "run", ["model.compute.scan=false", "model.compute.remat=none", "model.dropout=0.1"]
    )
    assert lm.restore(tmp_path / "run").config.model.compute.scan is False
    assert_bit_equal(tensors(folder("llama")), tensors(out_of(tmp_path / "run", tmp_path / "out")))


def test_an_import_that_fails_leaves_nothing_behind(folder, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save_params", full)
    assert "disk full" in refusal(capsys, "import-hf", folder("llama"), tmp_path / "run")
    assert not list(tmp_path.iterdir())
    source = copied(folder("llama"), tmp_path / "cut")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    assert "truncated" in refusal(capsys, "import-hf", source, tmp_path / "run")
    assert "config.json: no such file" in refusal(capsys, "import-hf", tmp_path / "no", tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["cut"]


def test_an_export_that_fails_leaves_what_was_there(folder, tmp_path, monkeypatch, capsys):
    convert.import_hf(folder("llama"), tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "_write_tokenizer", interrupted)
    assert command(capsys, "export-hf", tmp_path / "run", tmp_path / "out", "--overwrite")[0] == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    monkeypatch.undo()
    for target in (tmp_path / "run", tmp_path):
        assert "got one around the run" in refusal(capsys, "export-hf", tmp_path / "run", target, "--overwrite")
    assert "--dtype: expected one of" in refusal(
        capsys, "export-hf", tmp_path / "run", tmp_path / "new", "--dtype", "int8"
    )
    assert "no checkpoint of step 4; there are 0" in refusal(
        capsys, "export-hf", tmp_path / "run", tmp_path / "new", "--step", "4"
    )
    assert lm.restore(tmp_path / "run").step == 0
