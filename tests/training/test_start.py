"""What refuses a run leaves its folder as it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from lm.config import Config, resolved
from lm.data import Data, SentencePiece, Stream, Text, open_corpus, prepare
from lm.errors import UserError
from lm.mesh import make_mesh
from lm.training import start as starts
from lm.training.loop import Loop
from lm.training.programs import Programs
from lm.training.setup import Setup
from lm.training.start import Start
from lm.training.state import Position
from lm.training.train import train
from lm.workdir import Workdir
from tests.training.conftest import VOCAB_SIZE


def digest(folder: Path) -> dict[str, tuple]:
    """Every path below a folder with its bytes and times, the lock's apart."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = content, path.stat().st_mtime_ns
    found.pop("run.lock", None)
    return found


def small(config: Config) -> Config:
    model = dataclasses.replace(config.model, n_layers=1, d_model=8, d_ff=12, dropout=0.0)
    train = dataclasses.replace(config.train, steps=3, log_every=1)
    return dataclasses.replace(config, model=model, train=train)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """The folder of a run of 3 steps, which is made once."""
    made: list[Path] = []

    def of(config: Config) -> Path:
        if not made:
            made.append(tmp_path_factory.mktemp("trained") / "run")
            train(resolved(small(config)), made[0])
        return made[0]

    return of


@pytest.fixture
def run(config, trained, tmp_path) -> tuple[Config, Path]:
    """A config and a copy of its run."""
    shutil.copytree(trained(config), tmp_path / "run")
    return small(config), tmp_path / "run"


@pytest.fixture(scope="module")
def others(tmp_path_factory, corpus) -> dict[str, Data]:
    """Corpora of another text, and of another tokenizer."""
    folder = tmp_path_factory.mktemp("others")
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"{i} the other text has these words in place of those " * 9)
    sources = {"words": Text(glob=str(folder / "*.txt"))}
    found = {
        "text": dataclasses.replace(
            corpus, path=str(folder / "text"), sources=sources, tokenizer=f"{corpus.path}/tokenizer.model"
        ),
        "tokenizer": dataclasses.replace(
            corpus, path=str(folder / "tokenizer"), tokenizer=SentencePiece(vocab_size=VOCAB_SIZE, kind="bpe")
        ),
    }
    for data in found.values():
        prepare(data, progress=False, log=lambda _: None)
    return found


REFUSED = {
    "model": (["model.d_ff=16", "train.steps=9"], r"layers\.mlp\.down is \(1, 12, 8\) here, expected"),
    "depth": (["model.n_layers=2"], r"another model\.n_layers"),
    "data order": (["data.seed=7"], r"data\.seed.*0.*7"),
    "rows": (["data.seq_len=8"], r"data\.seq_len"),
    "optimizer": (["optim=Lion(lr=1e-3)"], "another optimizer"),
    "epochs": (["train.steps=1000", "data.epochs={'words': 1.0}"], r"data\.epochs\['words'\]: expected text for 1000"),
    "mesh": (["mesh.data=16", "data.batch_size=64"], "mesh"),
    "rules": (["rules.embed='tensor'"], "both go to"),
    "activations": (["mesh.data=1", "mesh.fsdp=1", "mesh.seq=8", "data.seq_len=12"], r"not divisible by mesh\.seq 8"),
    "task": (["model.task=SequenceClassification(n_labels=3)"], r"model\.task"),
    "start id": (["objective.start_id=7"], r"objective\.start_id"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_resume_that_is_refused_leaves_every_byte_as_it_was(run, name):
    (config, folder), (overrides, message) = run, REFUSED[name]
    before = digest(folder)
    with pytest.raises(UserError, match=message):
        train(resolved(config, overrides), folder)
    assert digest(folder) == before


@pytest.mark.parametrize("name", ["text", "tokenizer"])
def test_a_resume_on_another_corpus_is_refused_and_leaves_every_byte_as_it_was(run, others, name):
    config, folder = run
    before = digest(folder)
    with pytest.raises(UserError, match=r"data\.(weights|tokenizer): expected .* as when the checkpoint was written"):
        train(resolved(dataclasses.replace(config, data=others[name])), folder)
    assert digest(folder) == before


def test_a_moving_average_that_was_not_kept_is_refused_and_leaves_every_byte_as_it_was(run):
    config, folder = run
    step = folder / "checkpoints" / "3"
    shutil.rmtree(step / "ema")
    metadata, sums = (json.loads((step / name).read_text()) for name in ("_CHECKPOINT_METADATA", "checksums.json"))
    del metadata["item_handlers"]["ema"]
    sums["files"] = {name: sum for name, sum in sums["files"].items() if not name.startswith("ema/")}
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    (step / "checksums.json").write_text(json.dumps(sums))
    before = digest(folder)
    with pytest.raises(UserError, match="3/ema: not in this checkpoint, which has params, train"):
        train(resolved(config), folder)
    assert digest(folder) == before


def test_an_imported_model_is_not_gone_on_from_and_stays_as_it_was(run):
    config, folder = run
    (folder / "hf").mkdir()
    before = digest(folder)
    with pytest.raises(UserError, match="got an imported model"):
        train(resolved(config), folder)
    assert digest(folder) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.start_id=7"], r"objective\.start_id"),
        (["rules.embed='tensor'"], "both go to"),
        (["train.init_from=nowhere"], r"train\.init_from: nowhere"),
        (["train.init_from={run}", "model.d_ff=16"], r"train\.init_from: .*layers\.mlp\.down .* set model to what it"),
        (["train.steps=1000", "data.epochs={'words': 1.0}"], r"data\.epochs"),
    ],
)
def test_a_new_run_that_is_refused_makes_no_folder(run, tmp_path, overrides, message):
    config, folder = run
    with pytest.raises(UserError, match=message):
        train(resolved(config, [o.replace("{run}", str(folder)) for o in overrides]), tmp_path / "of/new/runs")
    assert not (tmp_path / "of").exists()


@pytest.mark.parametrize("at", ["restore", "compile"])
def test_a_run_that_is_killed_while_it_starts_leaves_every_byte_as_it_was(run, monkeypatch, at):
    """What it does before the loop is over when the last refusal is: the step is compiled and the state is there."""
    config, folder = run
    before = digest(folder)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((Start, "state") if at == "restore" else (Programs, "__getitem__")), killed)
    monkeypatch.setattr(Programs, "_compile", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        train(resolved(config, ["train.steps=9", "optim.lr=0.5"]), folder)
    assert digest(folder) == before


def test_what_is_found_is_the_latest_checkpoint_or_nothing(run, tmp_path):
    config, folder = run
    setup = Setup.make(config, make_mesh(config.mesh))
    stream = Stream.of(config.data, open_corpus(config.data))
    found, new = (Start.find(Workdir.of(path), setup, stream) for path in (folder, tmp_path / "new"))
    assert found.position == Position(3, 24) and found.meta is not None
    assert new.position == Position(0, 0) and new.meta is None
    assert not (tmp_path / "new").exists()


def test_a_loop_is_entered_again_without_compiling_again(run, monkeypatch):
    """Steps 4 and 5, then 6 and 7 by the same loop: what one run of them makes."""
    from lm import distributed

    config, folder = run
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=7))
    shutil.copytree(folder, folder.parent / "whole")
    corpus = starts.open_data(config, folder)
    setup = Setup.make(config, make_mesh(config.mesh))
    stream = Stream.of(config.data, corpus)

    class Seen:
        def __init__(self):
            self.losses = []

        def look(self, done):
            self.losses.append((done.step, float(done.metrics["loss"])))

    seen, whole = Seen(), Seen()
    loop = Loop(resolved(config), setup, corpus, stream, Programs(setup), [seen])
    monkeypatch.setattr(distributed.StopSignal, "requested", lambda self, step: step == 5)
    start = Start.find(Workdir.of(folder), setup, stream)
    assert loop.run(start.state(setup), start).preempted
    programs = dict(loop.programs._made)
    monkeypatch.undo()
    start = Start.find(Workdir.of(folder), setup, stream)
    assert start.position.step == 5
    assert not loop.run(start.state(setup), start).preempted
    assert loop.programs._made == programs
    start = Start.find(Workdir.of(folder.parent / "whole"), setup, stream)
    Loop(resolved(config), setup, corpus, stream, loop.programs, [whole]).run(start.state(setup), start)
    assert seen.losses == whole.losses and [step for step, _ in seen.losses] == [4, 5, 6, 7]
