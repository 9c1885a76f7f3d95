"""The recipes of `configs/`: published sizes, training of the tiny ones shrunk further, and what is refused at load."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest

import lm
from lm import cli, distributed
from lm import config as configs
from lm.config import Config
from lm.data import Data, SentencePiece, Stream, Text, prepare
from lm.describe import describe
from lm.errors import EXIT_FINISHED, UserError
from lm.mesh import Mesh
from lm.models.base import abstract
from lm.models.cost import count, count_active
from lm.training.train import train
from tests.halves import slow_but
from tests.tolerances import assert_close, assert_equal
from tests.training import runs

RECIPES = sorted(p.stem for p in (Path(__file__).parent.parent / "configs").glob("*.py"))
TINY = [name for name in RECIPES if name.endswith("_tiny")]

# Parameters of the released weights of that name, unless it says otherwise.
PUBLISHED = {
    "albert_xxlarge": 223_158_450,  # AlbertForPreTraining of albert-xxlarge-v2, the tied table counted once
    "bart_base": 139_420_416,
    "bert_base": 110_106_428,  # BertForPreTraining of bert-base
    # ElectraForPreTraining of electra-base and ElectraForMaskedLM of its generator, their embedding counted once
    "electra_base": 109_483_009 + 33_740_602 - 23_837_184,
    "gemma2_9b": 9_241_705_984,
    "gpt3_175b": 174_604_836_864,  # 175B in table 2.1 of the paper, which does not count exactly
    "llama2_7b": 6_738_415_616,
    "llama3_70b": 70_553_706_496,
    "llama3_8b": 8_030_261_248,
    "mixtral_8x7b": 46_702_792_704,
    "qwen3_8b": 8_190_735_360,
    "roberta_base": 124_697_433,
    "t5_1_1_xl": 2_849_757_184,
    "t5_base": 222_903_552,
    "transformer_big": 214_245_376,  # 213M in table 3 of the paper
}
ACTIVE = {"mixtral_8x7b": 12_879_925_248}  # "13B active parameters" (Jiang et al., 2024)

VOCAB, SEQ, TOKENIZER = 320, 24, 277
SMALLER = {
    "albert_tiny": ["model.d_embed=20", "model.d_ff=36"],
    "bart_tiny": ["model.d_ff=36"],
    "bert_tiny": ["model.d_ff=36"],
    "electra_tiny": ["model.d_embed=20", "model.d_ff=36", "model.generator.d_model=12"],
    "gemma2_tiny": ["model.d_ff=36", "model.head_dim=6", "model.window=5"],
    "gpt3_tiny": ["model.window=5"],
    "llama_tiny": ["model.d_ff=36"],
    "mixtral_tiny": ["model.d_ff=36"],
    "qwen3_tiny": ["model.d_ff=36", "model.head_dim=10"],
    "roberta_tiny": ["model.d_ff=36"],
    "t5_tiny": ["model.d_ff=36", "model.head_dim=10"],
    "transformer_tiny": ["model.d_ff=36", "objective.max_source=12", "objective.max_target=20"],
}
STEPS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Data:
    """Documents of two lines that are nearly alike: what a model learns of one step helps it in the next."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(3)
    words = ["".join(rng.choices("etaoinshr", k=rng.randint(2, 7))) for _ in range(60)]
    for i in range(48):
        (folder / f"{i:02}.txt").write_text(f"{words[0]} {words[i]}\n{' '.join(words[:4])} {words[i]}\n")
    data = Data(
        path=str(folder / "prepared"),
        sources={"words": Text(glob=str(folder / "*.txt"))},
        tokenizer=SentencePiece(vocab_size=TOKENIZER),
        validation_fraction=0.3,
        seq_len=SEQ,
        batch_size=8,
        workers=1,
    )
    prepare(data, progress=False, log=lambda _: None)
    return data


def small(name: str, corpus: Data, *overrides: str) -> Config:
    """A tiny recipe on `corpus`, smaller still, with the ids behind the tokenizer's moved to its new end."""
    recipe = configs.load(name)
    assert isinstance(recipe.data.tokenizer, SentencePiece)
    moved = recipe.data.tokenizer.vocab_size - TOKENIZER
    fields = {f.name: getattr(recipe.objective, f.name) for f in dataclasses.fields(recipe.objective)}
    ids = {k: v - moved for k, v in fields.items() if isinstance(v, int) and v >= TOKENIZER}
    config = dataclasses.replace(recipe, data=corpus, objective=dataclasses.replace(recipe.objective, **ids))
    smaller = [f"model.vocab_size={VOCAB}", "model.d_model=24", "model.n_layers=2", *SMALLER[name]]
    shorter = [f"train.steps={STEPS}", "train.log_every=1", "optim.schedule.warmup_steps=1", "checkpoint.every=100"]
    return configs.resolved(config, [*smaller, *shorter, *overrides]).config


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """name -> workdir of a whole run of the small recipe, made once for each."""

    @functools.cache
    def run(name: str) -> Path:
        workdir = tmp_path_factory.mktemp(name)
        train(configs.resolved(small(name, corpus)), workdir)
        return workdir

    return run


def records(workdir: Path, kind: str) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves_and_says_its_size(name):
    config = configs.resolve(name).config
    infos = abstract(config.model).infos
    parameters, active = count(infos), count_active(config.model, infos)
    assert parameters == PUBLISHED.get(name, parameters)
    said = f"{parameters:,}, {active:,} active for a token" if active != parameters else f"{parameters:,}"
    assert f"parameters        {said}\n" in describe(name)
    if name in ACTIVE:
        assert active == ACTIVE[name]


def test_published_sizes_are_of_recipes_that_are_here():
    assert PUBLISHED.keys() <= set(RECIPES)
    assert set(TINY) == SMALLER.keys()


@pytest.mark.parametrize("name", slow_but(["bert_tiny"], TINY))
def test_a_tiny_recipe_learns_and_is_evaluated(name, trained):
    workdir = trained(name)
    losses = [r["loss"] for r in records(workdir, "train")]
    assert len(losses) == STEPS and np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.05
    (evaluation,) = records(workdir, "eval")
    assert evaluation["words"]["tokens"] > 0 and evaluation["words"]["loss"] < losses[0]
    is_length_of_text = configs.load(name).objective.family == "decoder"
    assert ("bits_per_byte" in evaluation["words"]) == is_length_of_text
    assert lm.restore(workdir).step == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert_tiny", "t5_tiny"])
def test_stopped_and_resumed_is_bit_equal_to_uninterrupted(name, corpus, trained, tmp_path, monkeypatch):
    config = configs.resolved(small(name, corpus))
    monkeypatch.setattr(distributed.StopSignal, "requested", lambda self, step: step == 1)
    assert train(config, tmp_path).preempted
    monkeypatch.undo()
    assert not train(config, tmp_path).preempted
    again, whole = (jax.device_get(lm.restore(w).params) for w in (tmp_path, trained(name)))
    assert_equal(again, whole)
    assert [r["loss"] for r in records(tmp_path, "train")] == [r["loss"] for r in records(trained(name), "train")]


MESHES = {
    "llama": ("llama_tiny", Mesh(data=2, fsdp=2, tensor=2), []),
    "bert": ("bert_tiny", Mesh(data=2, fsdp=2, tensor=2), []),
    "t5": ("t5_tiny", Mesh(data=2, fsdp=2, tensor=2), []),
    "mixtral": ("mixtral_tiny", Mesh(data=2, fsdp=1, expert=2, tensor=2), []),
    "mixtral, capacity": ("mixtral_tiny", Mesh(data=2, fsdp=1, expert=2, tensor=2), ["model.capacity_factor=1.0"]),
}


@pytest.mark.parametrize("case", slow_but(["mixtral, capacity"], MESHES))
def test_eight_devices_compute_what_one_does(case, corpus):
    name, mesh, overrides = MESHES[case]
    # The momentum of SGD is the gradient; other optimizers would turn the noise of one that is 0 into a step.
    config = dataclasses.replace(small(name, corpus, *overrides), optim=runs.SGD_)
    stores = prepare(corpus, progress=False).train
    rows = Stream(stores, weights=None, seq_len=SEQ, seed=0).rows(np.arange(8))
    batch = config.objective.examples({"tokens": rows, "id": np.arange(8)})
    found = []
    for where in (runs.ONE_DEVICE, mesh):
        setup = runs.make_setup(config, where)
        state, metrics = setup.step(runs.start(setup), runs.put(batch, setup.batch_shardings))
        found.append(jax.tree.map(np.array, (state, metrics)))
    assert_close(found[1], found[0])


def test_evaluation_says_what_its_numbers_are_per(trained, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["eval", str(trained("bert_tiny"))])
    printed = capsys.readouterr().out
    assert e.value.code == EXIT_FINISHED
    assert "loss per masked token" in printed and "masked tokens" in printed
    assert "bits/byte" not in printed and "gzip" not in printed


REFUSED = [
    ("bert_tiny", ["objective=CausalLM()"], "CausalLM is for models of the family decoder, got Bert, which is of"),
    ("llama_tiny", ["objective=MaskedLM(mask_id=9, cls_id=7, sep_id=8, vocab_size=4096)"], "for models of the family"),
    ("t5_tiny", ["objective=CausalLM()"], "CausalLM is for models of the family decoder, got T5"),
    ("bert_tiny", ["model.vocab_size=4098"], "objective.sep_id: expected an id below model.vocab_size 4098, got 4098"),
    ("t5_tiny", ["model.vocab_size=4127"], "objective.first_sentinel_id: expected an id below model.vocab_size 4127"),
    ("llama_tiny", ["model.vocab_size=4095"], "model.vocab_size: 4095 is smaller than data.tokenizer.vocab_size 4096"),
    ("bert_tiny", ["objective.mask_id=4095"], "objective.mask_id: expected ids that the tokenizer never makes of text"),
    ("bart_tiny", ["objective.mask_id=4000"], "objective.mask_id: expected ids that the tokenizer never makes of text"),
    ("t5_tiny", ["objective.n_sentinels=33"], "objective.first_sentinel_id: expected ids that the tokenizer never"),
    ("bert_tiny", ["objective.vocab_size=4099"], "objective.vocab_size: expected that of data.tokenizer, 4096, got"),
    ("bert_tiny", ["data.seq_len=129"], "data.seq_len: 129 is beyond the position table of 128"),
    ("roberta_tiny", ["data.seq_len=129"], "data.seq_len: 129 is beyond the position table of 128"),
    ("bart_tiny", ["data.seq_len=97"], "data.seq_len: 97 is beyond the position table of 96"),
    (
        "bert_tiny",
        ["model.task=LanguageModeling()"],
        "model.task: MaskedLM trains MaskedLMAndPair, got LanguageModeling",
    ),
    (
        "llama_tiny",
        ["model.task=SequenceClassification(n_labels=3)"],
        "model.task: CausalLM trains LanguageModeling, got SequenceClassification",
    ),
    (
        "t5_tiny",
        ["model.task=TokenClassification(n_labels=3)"],
        "model.task: SpanCorruption trains LanguageModeling, got TokenClassification",
    ),
    (
        "llama_tiny",
        ["mesh.tensor=4"],
        "layers.attn.k: axis 'kv_heads' of size 2 is not divisible by mesh axis",
    ),
    ("bert_tiny", ["mesh.tensor=2"], "embed.table: axis 'vocab' of size 4099 is not divisible by mesh axis tensor=2"),
    ("mixtral_tiny", ["mesh.expert=8"], "axis 'experts' of size 4 is not divisible by mesh axis expert=8"),
    ("t5_tiny", ["mesh.seq=4"], "data.seq_len: 144 (rows of 30) is not divisible by mesh.seq 4"),
    ("bert_tiny", ["checkpoint.metric=bits_per_byte"], "checkpoint.metric: MaskedLM has no bits_per_byte"),
]


@pytest.mark.parametrize("name, overrides, message", REFUSED)
def test_what_does_not_go_together_is_refused_when_it_is_loaded(name, overrides, message):
    with pytest.raises(UserError) as e:
        configs.resolve(name, overrides)
    assert message in str(e.value) and "\n" not in str(e.value)


SIZES = {"Gemma": ", d_ff=36, head_dim=12", "Gemma2": ", d_ff=36, head_dim=12", "GPT2": ""}


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma", "Gemma2", "Qwen3", "GPT2", "Mixtral"])
def test_a_family_that_others_are_made_of_can_be_named(name):
    overrides = [f"model={name}(vocab_size=4096, d_model=24, n_layers=2, n_heads=2{SIZES.get(name, ', d_ff=36')})"]
    assert type(configs.resolve("llama_tiny", overrides).config.model).__name__ == name


@pytest.mark.parametrize("name", ["llama_tiny", "bert_tiny", "t5_tiny"])
def test_a_dense_model_may_have_an_axis_for_experts(name):
    assert configs.resolve(name, ["mesh.expert=2"]).config.mesh.expert == 2


def test_a_model_with_another_head_is_a_run_but_none_to_train(tmp_path):
    config = dataclasses.replace(configs.load("llama_tiny"), train=configs.Train(steps=20))
    labels = configs.resolved(config, ["model.task=SequenceClassification(n_labels=3)"])
    with pytest.raises(UserError, match="model.task: CausalLM trains LanguageModeling, got SequenceClassification"):
        train(labels, tmp_path / "run")
    assert not (tmp_path / "run").exists()
