"""Recipes, overrides, checks across sections and origins, none of which touches a device."""

import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from lm import codec
from lm import config as configs
from lm.config import Checkpoint, Config, Resolved, Train
from lm.data import Data, SentencePiece, Stdlib, Text
from lm.errors import UserError
from lm.mesh import Mesh
from lm.models import GPT2, Llama
from lm.objectives import CausalLM
from lm.optim import AdamW, Cosine, Lion

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if not p.stem.startswith("_"))

CONFIG = Config(
    model=Llama(vocab_size=300, d_model=24, n_layers=2, n_heads=6, n_kv_heads=3, d_ff=44),
    data=Data(
        path="corpus",
        sources={"code-3.11": Stdlib(include_tests=True), "notes": Text(glob="*.txt")},
        tokenizer=SentencePiece(vocab_size=300),
        seq_len=28,
        batch_size=20,
    ),
    objective=CausalLM(chunks=7),
    optim=AdamW(lr=0.003, schedule=Cosine(warmup_steps=4)),
    train=Train(steps=50, microbatches=2),
    checkpoint=Checkpoint(every=10),
)
RECIPE = """
from lm.config import Config, Train
from lm.data import Data, SentencePiece, Stdlib
from lm.models import GPT2
from lm.objectives import CausalLM
from lm.optim import AdamW

config = Config(
    model=GPT2(vocab_size=300, d_model=24, n_layers=2, n_heads=6, max_positions=28),
    data=Data(
        path="corpus", sources={"stdlib": Stdlib()}, tokenizer=SentencePiece(vocab_size=300), seq_len=28, batch_size=20
    ),
    objective=CausalLM(),
    optim=AdamW(lr=0.003),
    train=Train(steps=50),
)
"""


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resolves_and_survives_json(name):
    resolved = configs.resolve(name)
    again = Resolved.from_json(resolved.to_json(), "config.json")
    assert again == resolved
    assert repr(again.config) == repr(resolved.config)
    assert set(resolved.origins) == set(codec.flatten(codec.encode(resolved.config)))
    assert set(resolved.origins.values()) <= {"default", "recipe"}


def test_a_recipe_is_found_by_path_and_by_name(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    mine = tmp_path / "configs" / "mine.py"
    mine.write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    assert configs.load(str(mine)) == configs.load("configs/mine.py") == configs.load("mine")
    assert configs.load("mine").model == GPT2(vocab_size=300, d_model=24, n_layers=2, n_heads=6, max_positions=28)
    assert configs.find_recipe("quickstart") == ROOT / "configs" / "quickstart.py"  # the package's, from anywhere


def test_a_folder_of_the_same_name_does_not_hide_a_recipe(tmp_path, monkeypatch):
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert configs.find_recipe("quickstart") == ROOT / "configs" / "quickstart.py"


def test_a_recipe_may_define_a_class_of_its_own(tmp_path):
    recipe = tmp_path / "own_source.py"
    own = """
from __future__ import annotations
import dataclasses
from lm.data import Source

@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    chars: int = 10

@dataclasses.dataclass(frozen=True, kw_only=True)
class Reversed(Source):
    files: tuple[str, ...] = ()
    cut: Cut = Cut(chars=20)
"""
    recipe.write_text(own + RECIPE.replace("Stdlib()", "Reversed(files=['a', 'b'])"))
    resolved = configs.resolve(str(recipe), ["data.sources.stdlib.files=[c]"])
    assert resolved.config.data.sources["stdlib"].files == ("c",)
    assert resolved.origins["data.sources.stdlib.files"] == "command line"
    assert resolved.origins["data.sources.stdlib.cut.chars"] == "default"  # of Reversed, if not of Cut
    assert Resolved.from_json(resolved.to_json(), "config.json").config == resolved.config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected `config = Config(...)`, got no `config`"),
        ("config = {'steps': 3}", "expected `config = Config(...)`, got dict"),
        ("x = 1\nconfig = Config(", ":2: SyntaxError: '(' was never closed"),
        ("import no_such_package", ":1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("x = 1\n\nraise KeyError('tokens')", ":3: KeyError: 'tokens'"),
        ("raise RuntimeError('two\\nlines')", ":1: RuntimeError: two lines"),
        (RECIPE.replace("steps=50", "step=50"), ":15: TypeError: "),
        (RECIPE.replace("steps=50", "steps='50'"), ":15: TypeError: "),
        (RECIPE.replace("steps=50", "steps=0"), ":15: train.steps: expected at least 1, got 0"),
        (RECIPE.replace("n_heads=6", "n_heads=5"), ":9: model.n_heads: 5 does not divide model.d_model 24"),
    ],
)
def test_a_broken_recipe_is_one_line_with_file_and_line(tmp_path, text, message):
    recipe = tmp_path / "broken.py"
    recipe.write_text(text)
    with pytest.raises(UserError) as e:
        configs.resolve(str(recipe))
    assert str(e.value).startswith(str(recipe))
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_an_unknown_recipe_gets_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match=r"^quikstart: no recipe of that name; did you mean 'quickstart'\?$"):
        configs.resolve("quikstart")
    (tmp_path / "bert_base.py").write_text(RECIPE)
    with pytest.raises(UserError, match=r"bert_bse.py: no such recipe file; did you mean 'bert_base.py'\?$"):
        configs.resolve(str(tmp_path / "bert_bse.py"))
    with pytest.raises(UserError, match=r"^nowhere/x.py: no such recipe file$"):
        configs.resolve("nowhere/x.py")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"config": {}}', '{"config": 5, "origins": {}}', '{"config": {"_type": 5}, "origins": {}}']
)
def test_a_file_that_is_no_config_is_refused_by_name(text):
    with pytest.raises(UserError, match=r"^runs/x/config.json: .*expected|needs"):
        Resolved.from_json(text, "runs/x/config.json")


def test_a_stored_config_with_a_field_that_is_gone_names_it():
    tree = json.loads(configs.resolved(CONFIG).to_json())
    tree["config"]["train"]["grad_accum"] = 2
    with pytest.raises(UserError, match=r"^old.json: train.grad_accum: Train has no field 'grad_accum'"):
        Resolved.from_json(json.dumps(tree), "old.json")


def test_names_of_our_classes_are_unique_below_each_base():
    """What is stored is a name without its module."""

    def kinds(hint) -> set[type]:
        here = {hint} if isinstance(hint, type) and dataclasses.is_dataclass(hint) else set()
        return here.union(*(kinds(arg) for arg in typing.get_args(hint)))

    def below(base: type) -> set[type]:
        return {base}.union(*(below(kind) for kind in base.__subclasses__()))

    bases, todo = set(), {Config}
    while todo:
        base = todo.pop()
        bases.add(base)
        for kind in below(base):
            todo |= {found for hint in codec.field_types(kind).values() for found in kinds(hint)} - bases
    assert len(bases) > 20
    for base in bases:
        names = [kind.__name__ for kind in below(base) if kind.__module__.startswith("lm.")]
        assert len(names) == len(set(names)), base


# --- origins ----------------------------------------------------------------------------------------------------------


def origins(*overrides: str) -> dict[str, str]:
    return configs.resolved(CONFIG, overrides).origins


def test_origins_tell_default_from_recipe_at_every_depth():
    found = origins()
    recipe = {path for path, origin in found.items() if origin == "recipe"}
    assert recipe == {
        "_type",
        *(f"model.{f}" for f in ("_type", "vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")),
        *(f"data.{f}" for f in ("_type", "path", "seq_len", "batch_size")),
        "data.sources.code-3.11._type",
        "data.sources.code-3.11.include_tests",
        "data.sources.notes._type",
        "data.sources.notes.glob",
        "data.tokenizer._type",
        "data.tokenizer.vocab_size",
        "objective._type",
        "objective.chunks",
        "optim._type",
        "optim.lr",
        "optim.schedule._type",
        "optim.schedule.warmup_steps",
        *(f"train.{f}" for f in ("_type", "steps", "microbatches")),
        "checkpoint._type",
        "checkpoint.every",
    }
    assert set(found.values()) == {"recipe", "default"}


@pytest.mark.parametrize(
    ("override", "paths"),
    [
        ("train.steps=60", {"train.steps"}),
        ("train.steps=50", {"train.steps"}),  # the recipe's own value, but said again
        ("optim.betas=(0.8, 0.9)", {"optim.betas"}),
        ("mesh.data=2", {"mesh.data"}),
        ("data.tokenizer.kind=bpe", {"data.tokenizer.kind"}),
        ("data.tokenizer=other.model", {"data.tokenizer"}),
        ("data.sources.notes.glob=*.md", {"data.sources.notes.glob"}),
        ("data.sources.more=Text(glob=x)", {"data.sources.more._type", "data.sources.more.glob"}),
        ("data.weights={notes: 1, 'code-3.11': 2}", {"data.weights.notes", "data.weights.code-3.11"}),
        ("optim=Lion", {"optim._type"}),
        ("optim=Lion(lr=1e-4)", {"optim._type", "optim.lr"}),
        ("optim.schedule=Linear(warmup_steps=4)", {"optim.schedule._type", "optim.schedule.warmup_steps"}),
    ],
)
def test_the_command_line_owns_what_it_named_and_nothing_else(override, paths):
    before, after = origins(), origins(override)
    assert {p for p, o in after.items() if o == "command line"} == paths
    assert all(after[p] in (before.get(p), "default") for p in after if p not in paths)


def test_a_class_by_name_keeps_the_recipes_values_and_their_origin():
    resolved = configs.resolved(CONFIG, ["optim=Lion"])
    assert resolved.config.optim == Lion(lr=0.003, schedule=Cosine(warmup_steps=4))
    assert resolved.origins["optim.lr"] == resolved.origins["optim.schedule.warmup_steps"] == "recipe"
    assert resolved.origins["optim.betas"] == "default"


def test_a_class_call_does_not_keep_the_recipes_values():
    resolved = configs.resolved(CONFIG, ["optim=Lion(lr=0.003)"])
    assert resolved.config.optim == Lion(lr=0.003)
    assert resolved.origins["optim.lr"] == "command line"
    assert resolved.origins["optim.schedule.warmup_steps"] == "default"


def test_overriding_a_stored_config_keeps_the_origins_it_had():
    stored = configs.resolved(CONFIG, ["optim.lr=0.01"])
    again = configs.overridden(Resolved.from_json(stored.to_json(), "config.json"), ["train.log_every=3"])
    changed = {p for p in again.origins if again.origins[p] != stored.origins[p]}
    assert changed == {"train.log_every"}
    assert again.origins["optim.lr"] == again.origins["train.log_every"] == "command line"


# --- wrong configs ----------------------------------------------------------------------------------------------------

# overrides of CONFIG -> path, what came, way out
WRONG = {
    "batch and microbatches": ("train.microbatches=3", "train.microbatches: ", "3", "data.batch_size 20"),
    "batch and data shards": ("mesh.data=3", "data.batch_size: ", "20 / train.microbatches 2", "set a multiple of 6"),
    "batch and a fixed mesh": ("mesh=Mesh(data=2, fsdp=2)", "data.batch_size: ", "data=2 x fsdp=2", "a multiple of 8"),
    "sequence and mesh": ("mesh.seq=3", "data.seq_len: ", "28", "mesh.seq 3"),
    "sequence and positions": (
        "model=GPT2(d_model=24, n_heads=6, max_positions=27)",
        "data.seq_len: ",
        "28 is beyond the position table of 27",
        "raise model.max_positions or shorten data.seq_len",
    ),
    "vocabulary and tokenizer": ("model.vocab_size=299", "model.vocab_size: ", "299", "set them equal"),
    "best without evaluation": ("checkpoint.keep_best=1", "checkpoint.keep_best: ", "got 0", "set train.eval_every="),
    "chunks and sequence": ("objective.chunks=3", "objective.chunks: ", "3", "data.seq_len 28"),
    "warm-up and steps": ("train.steps=3", "optim.schedule.warmup_steps: ", "got 4", "shorten the warm-up"),
    "decay and steps": ("optim.schedule=WSD(decay_steps=51)", "optim.schedule.decay_steps: ", "got 51", "train longer"),
    "two free axes": ("mesh.data=-1", "mesh: ", "data=-1 x fsdp=-1", "only one axis may be -1"),
    "no devices": ("mesh.tensor=0", "mesh.tensor: ", "got 0", "a positive number of devices or -1"),
    "unknown mesh axis": ("rules.embed=fspd", "rules.embed: ", "'fspd'", "did you mean 'fsdp'?"),
    "mesh axis twice": ("rules.act_batch=[data,data]", "rules.act_batch: ", "('data', 'data')", "drop one"),
    "unknown section": ("optm.lr=1", "optm: ", "'optm'", "did you mean 'optim'?"),
    "unknown field": ("train.step=5", "train.step: ", "'step'", "did you mean 'steps'?"),
    "field of another class": ("model.zzz=5", "model.zzz: ", "Llama", "known: "),
    "unknown class": ("model=Lama", "model: ", "'Lama'", "did you mean 'Llama'?"),
    "class of another section": ("model=AdamW", "model: ", "'AdamW'", "known: Albert, Bart, Bert, Electra, GPT2, "),
    "no value": ("train.steps", "'train.steps': ", "", "expected path=value"),
    "float for int": ("train.steps=1e3", "train.steps: ", "got 1000.0", "write 1000"),
    "text for int": ("train.steps=many", "train.steps: ", "got 'many'", "expected int"),
    "int for bool": ("model.compute.scan=1", "model.compute.scan: ", "got 1", "write true or false"),
    "number for text": ("data.path=2024", "data.path: ", "got 2024", "for text write data.path='\"2024\"'"),
    "not finite": ("optim.lr=1e999", "optim.lr: ", "got inf", "a finite number"),
    "bad literal": ("train.precision=fp16", "train.precision: ", "'fp16'", "one of 'auto', 'float32', 'bfloat16'"),
    "bad remat": ("model.compute.remat=some", "model.compute.remat: ", "'some'", "one of 'none', "),
    "no steps": ("train.steps=0", "train.steps: ", "got 0", "at least 1"),
    "no batch": ("data.batch_size=0", "data.batch_size: ", "got 0", "at least 1"),
    "negative log interval": ("train.log_every=-1", "train.log_every: ", "got -1", "at least 1"),
    "negative eval interval": ("train.eval_every=-1", "train.eval_every: ", "got -1", "0 or more"),
    "negative rate": ("optim.lr=-1e-3", "optim.lr: ", "got -0.001", "> 0"),
    "one beta too many": ("optim.betas=(0.9, 0.9, 0.9)", "optim.betas: ", "got 3", "expected 2 values"),
    "beta of one": ("optim.betas=(0.9, 1.0)", "optim.betas: ", "(0.9, 1.0)", "each in [0, 1)"),
    "dropout of one": ("model.dropout=1.0", "model.dropout: ", "got 1.0", "a rate in [0, 1)"),
    "heads and width": ("model.n_heads=9", "model.n_heads: ", "9", "model.d_model 24"),
    "kv heads and heads": ("model.n_kv_heads=4", "model.n_kv_heads: ", "4", "model.n_heads 6"),
    "weights of other sources": ("data.weights={news: 1}", "data.weights: ", "['news']", "['code-3.11', 'notes']"),
    "no sources": ("data.sources={}", "data.sources: ", "got none", "add e.g."),
    "unknown source": ("data.sources.nots.glob=x", "data.sources.nots: ", "'nots'", "did you mean 'notes'?"),
    "source without files": ("data.sources.more=Text", "data.sources.more: ", "Text", "write Text(glob=...)"),
    "into none": ("data.weights.notes=1", "data.weights.notes: ", "is None", "set data.weights itself"),
    "keep nothing": ("checkpoint.keep_last=0", "checkpoint.keep_last: ", "got 0", "at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_config_is_one_line_with_path_got_and_way_out(name):
    override, path, got, way_out = WRONG[name]
    with pytest.raises(UserError) as e:
        configs.resolved(CONFIG, [override])
    assert str(e.value).startswith(path)
    assert got in str(e.value)
    assert way_out in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train": Train(steps=50, precision="fp16")},
            "train.precision: expected one of 'auto', 'float32', 'bfloat16', got 'fp16'",
        ),
        ({"model": GPT2(d_model=24, n_heads=6, n_layers=2.0)}, "model.n_layers: expected int, got 2.0; write 2"),
        ({"optim": AdamW(lr=0.1, betas=(0.9, False))}, "optim.betas[1]: expected float, got False"),
        ({"mesh": None}, "mesh: expected Mesh, got None; one of Mesh(...)"),
    ],
)
def test_types_are_checked_in_a_recipe_as_on_the_command_line(change, message):
    with pytest.raises(UserError) as e:
        configs.resolved(dataclasses.replace(CONFIG, **change))
    assert str(e.value) == message


def test_an_object_of_another_kind_is_refused_with_the_kinds_that_fit():
    with pytest.raises(UserError) as e:
        configs.resolved(dataclasses.replace(CONFIG, objective=AdamW(lr=0.1)))
    start, known = str(e.value).split("known: ")
    assert start == "objective: no Objective is called 'AdamW'; "
    ours = "CausalLM Denoising FillInTheMiddle MaskedLM PrefixLM ReplacedTokens Seq2Seq SpanCorruption UL2 UL2Decoder"
    assert set(known.split(", ")) >= set(ours.split())  # and those that other tests define


def test_a_list_in_a_recipe_becomes_the_tuple_it_stands_for():
    config = dataclasses.replace(CONFIG, optim=AdamW(lr=1, betas=[0.8, 0.9]))
    assert repr(configs.resolved(config).config.optim) == repr(AdamW(lr=1.0, betas=(0.8, 0.9)))


@pytest.mark.parametrize(
    ("overrides", "n_devices"),
    [((), 2), ((), 10), (("mesh.data=5",), 5), (("mesh.data=5",), 10), (("rules.act_batch=data",), 8)],
)
def test_check_mesh_accepts_what_divides_the_microbatch_of_ten(overrides, n_devices):
    configs.check_mesh(configs.resolved(CONFIG, overrides).config, n_devices)


def test_check_mesh_refuses_devices_that_do_not_divide_the_microbatch():
    with pytest.raises(UserError) as e:
        configs.check_mesh(CONFIG, 8)
    assert str(e.value) == (
        "data.batch_size: 20 / train.microbatches 2 is not divisible by the 8 data shards of the mesh "
        "(data=1 x fsdp=8 x expert=1); set a multiple of 16"
    )
    with pytest.raises(
        UserError, match=r"^mesh: fsdp=-1 x tensor=3 does not fit 8 devices; use a multiple of 3 devices"
    ):
        configs.check_mesh(dataclasses.replace(CONFIG, mesh=Mesh(tensor=3)), 8)


# --- devices ----------------------------------------------------------------------------------------------------------


def test_resolving_and_refusing_touch_no_device_and_load_no_tensorflow():
    code = """
import json, sys
from lm import config
from lm.errors import UserError
for overrides in [], ["mesh.data=2"], ["train.steps=0"], ["mesh.data=-1"], ["optim=Lion"], ["mesh.data=3"]:
    try:
        config.resolve("quickstart", overrides)
    except UserError:
        pass
from jax._src import xla_bridge
print(json.dumps([list(xla_bridge._backends), "tensorflow" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == [[], False]
