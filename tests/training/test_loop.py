"""A run as its user meets it: killed, stopped, resumed, refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import lm
from lm import distributed
from lm.checkpoint import Checkpoints
from lm.config import resolved
from lm.data import ExcludeExamples, SentencePiece, Stream, open_corpus
from lm.errors import EXIT_FINISHED, EXIT_PREEMPTED, UserError
from lm.training.train import train
from lm.training.watch import NonFiniteLoss
from lm.workdir import Workdir
from tests.checkpoint.damage import cut, flip
from tests.processes import train_command, until_saved, until_step
from tests.training.conftest import VOCAB_SIZE


def params_of(workdir: Path, step: int | None = None) -> dict:
    return jax.device_get(lm.restore(workdir, step=step).params)


def assert_bit_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def records(workdir: Path, kind: str = "train") -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def stop_at(monkeypatch, step: int) -> None:
    monkeypatch.setattr(distributed.StopSignal, "requested", lambda self, s: s == step)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """workdir of a whole run of a config, made once for each."""
    done: dict = {}

    def run(config) -> Path:
        if config not in done.values():
            workdir = tmp_path_factory.mktemp("whole")
            train(resolved(config), workdir)
            done[workdir] = config
        return next(w for w, c in done.items() if c == config)

    return run


def test_run_learns_and_leaves_all_that_belongs_to_it(config, uninterrupted):
    workdir = uninterrupted(config)
    losses = [r["loss"] for r in records(workdir)]
    assert losses[-1] < losses[0] - 0.3
    assert [r["step"] for r in records(workdir)] == [1, 4, 8, 12]
    assert records(workdir)[-1]["examples_seen"] == 12 * 8
    assert records(workdir)[-1]["mfu"] is None  # no peak is known for a CPU
    last = records(workdir, "eval")[-1]
    assert last["step"] == 12 and last["words"]["bits_per_byte"] < 8
    assert Checkpoints(workdir).steps() == [10, 12]
    assert any((workdir / "tensorboard").iterdir())
    restored = lm.restore(workdir)
    assert restored.config == config
    assert restored.tokenizer.decode(restored.tokenizer.encode("a b")) == "a b"


@pytest.mark.parametrize("step", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_bit_equal_to_uninterrupted(config, uninterrupted, tmp_path, monkeypatch, step):
    stop_at(monkeypatch, step)
    result = train(resolved(config), tmp_path)
    assert result.preempted and result.step == step
    monkeypatch.undo()
    assert not train(resolved(config), tmp_path).preempted
    whole = uninterrupted(config)
    assert_bit_equal(params_of(tmp_path), params_of(whole))
    assert [r["step"] for r in records(tmp_path)] == sorted({1, 4, 8, 12, step})
    assert records(tmp_path)[-1]["loss"] == pytest.approx(records(whole)[-1]["loss"], abs=0 if step != 10 else 1)


@pytest.mark.slow
def test_resumes_on_another_mesh(config, uninterrupted, tmp_path, monkeypatch):
    stop_at(monkeypatch, 6)
    train(resolved(config), tmp_path)
    monkeypatch.undo()
    train(
        resolved(config, ["mesh.data=1", "mesh.tensor=2", "rules.kv_heads=None", "rules.act_kv_heads=None"]), tmp_path
    )
    a, b = records(tmp_path)[-1], records(uninterrupted(config))[-1]
    assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


@pytest.mark.slow
def test_batch_size_may_change_at_a_resume_without_repeating_examples(config, tmp_path, monkeypatch):
    stop_at(monkeypatch, 4)
    train(resolved(config), tmp_path)
    monkeypatch.undo()
    train(resolved(config, ["data.batch_size=16"]), tmp_path)
    assert records(tmp_path)[-1]["examples_seen"] == 4 * 8 + 8 * 16


def test_finished_run_is_evaluated_again_and_nothing_else(config, uninterrupted, capsys):
    workdir = uninterrupted(config)
    before, evaluated = params_of(workdir), [r["step"] for r in records(workdir, "eval")]
    for _ in range(2):
        result = train(resolved(config), workdir)
        assert result.step == 12 and result.evaluation is not None
        assert_bit_equal(params_of(workdir), before)
        assert "nothing to train: step 12 of train.steps=12 is done" in capsys.readouterr().out
        assert [r["step"] for r in records(workdir, "eval")] == evaluated


def test_a_run_goes_on_from_the_newest_whole_checkpoint_to_the_parameters_of_the_uninterrupted(
    config, uninterrupted, tmp_path, capsys
):
    whole, workdir = uninterrupted(config), tmp_path / "run"
    shutil.copytree(whole, workdir)
    with contextlib.suppress(FileNotFoundError):
        (workdir / "run.lock").unlink()
    name = flip(workdir / "checkpoints" / "12", "train")
    spoil_log(workdir / "metrics.jsonl")
    train(resolved(config), workdir)
    out = capsys.readouterr().out
    assert f"checkpoint of step 12 is damaged: {name}: expected CRC-32 " in out
    assert "resuming at step 10" in out and "line(s) that are no records are set aside in metrics.damaged.txt" in out
    assert_bit_equal(params_of(workdir), params_of(whole))
    assert Checkpoints(workdir).steps() == [10, 12] and (workdir / "checkpoints" / "12.damaged").is_dir()
    assert [r["step"] for r in records(workdir)] == [1, 4, 8, 12]
    assert (workdir / "metrics.damaged.txt").read_bytes() == b"\xff\xfe\n[1]\n"


def spoil_log(path: Path) -> None:
    """Lines of another program between the records, and the half line of a killed run at the end."""
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\n\xff\xfe\n[1]\n" + rest + b'{"kind": "tr')


def test_a_run_without_a_whole_checkpoint_is_refused_and_left_as_it_is(config, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted(config), workdir)
    flip(workdir / "checkpoints" / "12")
    cut(workdir / "checkpoints" / "10")
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file() and p.name != "run.lock"}
    with pytest.raises(UserError, match=r"expected a checkpoint that is whole, got none: 12/params/.*to begin anew"):
        train(resolved(config), workdir)
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file() and p.name != "run.lock"} == before


def test_a_signal_while_the_last_checkpoint_is_written_does_not_lose_it(config, tmp_path, monkeypatch):
    wait, sent = Checkpoints.wait, []

    def killed(self):
        sent.append(os.kill(os.getpid(), signal.SIGTERM))
        wait(self)

    def lost(*_):
        raise AssertionError("expected the run to handle SIGTERM until its checkpoint is written")

    monkeypatch.setattr(Checkpoints, "wait", killed)
    before = signal.signal(signal.SIGTERM, lost)
    try:
        assert not train(resolved(config), tmp_path).preempted and sent
    finally:
        signal.signal(signal.SIGTERM, before)
    assert Checkpoints(tmp_path).latest() == config.train.steps


def test_other_data_order_is_refused(config, uninterrupted):
    with pytest.raises(UserError, match=r"data\.seed.*0.*7"):
        train(resolved(config, ["data.seed=7"]), uninterrupted(config))


def test_other_model_is_refused_and_nothing_is_lost(config, uninterrupted):
    workdir = uninterrupted(config)
    before = params_of(workdir)
    with pytest.raises(UserError, match=r"layers\.mlp\.down is \(2, 24, 16\) here, expected \(2, 32, 16\)"):
        train(resolved(config, ["model.d_ff=32", "train.steps=20"]), workdir)
    assert_bit_equal(params_of(workdir), before)


@pytest.mark.slow
def test_weights_of_another_tokenizer_are_refused_to_begin_with(config, uninterrupted, tmp_path):
    init_from = f"train.init_from={uninterrupted(config)}"
    train(resolved(config, [init_from, "data.seq_len=8"]), tmp_path / "same")
    other = SentencePiece(vocab_size=VOCAB_SIZE, kind="bpe")
    data = dataclasses.replace(config.data, path=str(tmp_path / "corpus"), tokenizer=other)
    with pytest.raises(UserError, match=r"train\.init_from: .*expected a corpus of its tokenizer") as e:
        train(resolved(dataclasses.replace(config, data=data), [init_from]), tmp_path / "other")
    way_out = [re.findall(r"data\.tokenizer=\S+", str(e.value))[0], f"data.path={tmp_path / 'new'}"]
    train(resolved(dataclasses.replace(config, data=data), [init_from, *way_out]), tmp_path / "other")


@pytest.mark.slow
def test_a_run_without_anything_to_predict_is_stopped(config, tmp_path):
    n = open_corpus(config.data).train["words"].n_documents
    nothing = f'data.exclude=(ExcludeDocuments(source="words",ranges=((0,{n}),)),)'
    with pytest.raises(UserError, match="step 16: expected something to predict, got no target in 16 steps; `lm data"):
        train(resolved(config, ["train.steps=40", nothing]), tmp_path / "none")
    train(resolved(config, ["train.steps=15", nothing]), tmp_path / "few")  # may happen


def test_live_run_keeps_its_workdir(config, tmp_path):
    with Workdir.of(tmp_path).open(), pytest.raises(UserError, match=f"in use by a live run .process {os.getpid()}"):
        train(resolved(config), tmp_path)


def test_non_finite_loss_names_step_examples_and_documents(config, tmp_path):
    broken = [
        "optim.lr=1e30",
        "optim.clip_norm=None",
        "optim.ema_decay=None",
        "checkpoint.every=1",
        "train.log_every=3",
    ]
    with pytest.raises(NonFiniteLoss, match=r"step (\d+): loss .*examples \d+\.\.\d+ .*last good checkpoint: step \d"):
        train(resolved(config, broken), tmp_path)
    (report,) = tmp_path.glob("nonfinite_step_*.json")
    found = json.loads(report.read_text())
    assert len(found["rows"]) == 8 and {"source", "row", "spans"} <= found["rows"][0].keys()
    assert found["examples"] == [8 * (found["step"] - 1), 8 * found["step"]]
    last = Checkpoints(tmp_path).latest()
    assert last is not None and all(np.isfinite(x).all() for x in jax.tree.leaves(params_of(tmp_path, last)))


@pytest.mark.slow
def test_a_spike_is_reported_with_its_documents_and_how_to_pass_over_them(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lm.training.watch.AT_LEAST", 8)
    monkeypatch.setattr("lm.training.watch.WINDOW", 8)
    read = Stream.read

    def foreign(self, located):
        tokens = read(self, located)
        other = np.random.default_rng(0).integers(3, VOCAB_SIZE, tokens.shape, np.int32)
        return np.where((located.example // 8 == 35)[:, None], other, tokens)

    monkeypatch.setattr(Stream, "read", foreign)
    overrides = ["train.steps=40", "optim.lr=0.03"]
    train(resolved(config, overrides), tmp_path)
    (report,) = tmp_path.glob("spike_step_*.json")
    found = json.loads(report.read_text())
    assert (report.name, found["step"], found["examples"]) == ("spike_step_36.json", 36, [280, 288])
    assert found["go_back_to_step"] == 35
    assert found["sigmas"] > 8 and found["loss"] > found["median"] + 1 and len(found["rows"]) == 8
    assert "step 36: loss" in capsys.readouterr().out
    (line,) = (x for x in report.read_text().splitlines() if "pass_over_with" in x)
    (shown,) = shlex.split(line.partition(": ")[2].rstrip(","))  # copied into a shell as it stands there
    assert shown == found["pass_over_with"]
    again = resolved(config, [*overrides, shown])
    assert again.config.data.exclude == (ExcludeExamples(ranges=((280, 288),)),)
    train(again, tmp_path / "without")
    assert not list((tmp_path / "without").glob("spike*"))


RAMP = "data.ramp=(BatchPhase(until_examples=12,batch_size=4,seq_len=8),BatchPhase(until_examples=40,seq_len=4))"


@pytest.mark.slow
def test_a_ramp_reads_the_same_order_in_other_batches(config, tmp_path, capsys):
    """4, 4 and 4 examples in rows of 8, four times 8 in rows of 4, then 8 in whole rows."""
    train(resolved(config, [RAMP, "train.log_every=1"]), tmp_path)
    losses = [(r["step"], r["examples_seen"], r["loss"]) for r in records(tmp_path)]
    assert [n for _, n, _ in losses] == [4, 8, 12, 20, 28, 36, 44, 52, 60, 68, 76, 84]
    out = capsys.readouterr().out
    for line in ("from example 0: batches of 8 x 8", "from example 12: batches of 32 x 4", "44: batches of 8 x 16"):
        assert line in out
    assert all(np.isfinite(loss) for _, _, loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 5, 7])
def test_a_ramp_stopped_anywhere_and_resumed_is_bit_equal(config, uninterrupted, tmp_path, monkeypatch, step):
    ramped = resolved(config, [RAMP, "train.log_every=1"]).config
    whole = uninterrupted(ramped)
    stop_at(monkeypatch, step)
    assert train(resolved(ramped), tmp_path).preempted
    monkeypatch.undo()
    train(resolved(ramped), tmp_path)
    assert_bit_equal(params_of(whole), params_of(tmp_path))
    assert [r["loss"] for r in records(whole)] == [r["loss"] for r in records(tmp_path)]


@pytest.mark.slow
def test_a_ramp_on_two_meshes_has_the_same_losses(config, uninterrupted, tmp_path):
    ramped = resolved(config, [RAMP, "train.log_every=1"]).config
    train(resolved(ramped, ["mesh.fsdp=2", "mesh.seq=2"]), tmp_path)
    losses = [[r["loss"] for r in records(w)] for w in (uninterrupted(ramped), tmp_path)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([RAMP, "mesh.data=8"], "data.ramp: batches of 8 x 8: 8 is not divisible by the 32 data shards"),
        (
            [RAMP, "train.microbatches=16"],
            "16 does not divide the 8 rows of data.ramp: batches of 8 x 8",
        ),
        (
            [RAMP.replace("seq_len=4", "seq_len=2"), "objective.chunks=4"],
            "data.ramp: objective.chunks: 4 does not divide",
        ),
    ],
)
def test_a_ramp_that_does_not_fit_is_refused_before_a_device_is_touched(config, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolved(config, overrides)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_at_a_random_step_and_restarted_is_bit_equal(config, recipe, tmp_path):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=120, log_every=1))
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=2))
    path = recipe(config)
    killed = train_command(path, tmp_path / "killed", devices=2)
    until_saved(tmp_path / "killed", killed)
    until_step(tmp_path / "killed", random.SystemRandom().randint(7, 60), killed)
    killed.kill()
    killed.communicate()
    kept = Checkpoints(tmp_path / "killed").latest()
    assert kept is not None and 5 <= kept < 120
    again, whole = (train_command(path, tmp_path / name, devices=2) for name in ("killed", "whole"))
    outputs = [process.communicate(timeout=300)[0] for process in (again, whole)]
    assert (again.returncode, whole.returncode) == (EXIT_FINISHED, EXIT_FINISHED), outputs
    assert f"resuming at step {kept}" in outputs[0]
    assert_bit_equal(params_of(tmp_path / "killed"), params_of(tmp_path / "whole"))
    assert [r["loss"] for r in records(tmp_path / "killed")] == [r["loss"] for r in records(tmp_path / "whole")]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_85(config, recipe, tmp_path, number):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=100_000, log_every=1))
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=1))
    process = train_command(recipe(config), tmp_path / "run", "checkpoint.every=100000")
    until_step(tmp_path / "run", 3, process)
    process.send_signal(number)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == EXIT_PREEMPTED, out
    (step,) = Checkpoints(tmp_path / "run").steps()
    assert f"stopped at step {step}, checkpoint saved" in out
