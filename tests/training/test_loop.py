"""A run as its user meets it: killed, stopped, resumed, refused."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import lm
from lm import distributed
from lm.checkpoint import Checkpoints
from lm.config import resolved
from lm.errors import EXIT_FINISHED, EXIT_PREEMPTED, UserError
from lm.training import loop
from lm.training.loop import NonFiniteLoss, train


def params_of(workdir: Path, step: int | None = None) -> dict:
    return jax.device_get(lm.restore(workdir, step=step).params)


def assert_bit_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def records(workdir: Path, kind: str = "train") -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def stop_at(monkeypatch, step: int) -> None:
    monkeypatch.setattr(distributed.StopSignal, "requested", lambda self, s: s == step)


def command(recipe: Path, workdir: Path, *more: str, devices: int = 1) -> subprocess.Popen:
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    args = [sys.executable, "-m", "lm", "train", str(recipe), "--workdir", str(workdir), *more]
    return subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and any(json.loads(line)["step"] >= step for line in path.read_text().splitlines()[:-1]):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


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


@pytest.mark.parametrize("step", [3, 10])
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


def test_resumes_on_another_mesh(config, uninterrupted, tmp_path, monkeypatch):
    stop_at(monkeypatch, 6)
    train(resolved(config), tmp_path)
    monkeypatch.undo()
    train(
        resolved(config, ["mesh.data=1", "mesh.tensor=2", "rules.kv_heads=None", "rules.act_kv_heads=None"]), tmp_path
    )
    a, b = records(tmp_path)[-1], records(uninterrupted(config))[-1]
    assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


def test_batch_size_may_change_at_a_resume_without_repeating_examples(config, tmp_path, monkeypatch):
    stop_at(monkeypatch, 4)
    train(resolved(config), tmp_path)
    monkeypatch.undo()
    train(resolved(config, ["data.batch_size=16"]), tmp_path)
    assert records(tmp_path)[-1]["examples_seen"] == 4 * 8 + 8 * 16


def test_finished_run_is_evaluated_again_and_nothing_else(config, uninterrupted):
    workdir = uninterrupted(config)
    before = params_of(workdir)
    result = train(resolved(config), workdir)
    assert result.step == 12 and result.evaluation is not None
    assert_bit_equal(params_of(workdir), before)


def test_other_data_order_is_refused(config, uninterrupted):
    with pytest.raises(UserError, match=r"data\.seed.*0.*7"):
        train(resolved(config, ["data.seed=7"]), uninterrupted(config))


def test_other_model_is_refused_and_nothing_is_lost(config, uninterrupted):
    workdir = uninterrupted(config)
    before = params_of(workdir)
    with pytest.raises(UserError, match=r"layers\.mlp\.down is \(2, 24, 16\) here, expected \(2, 32, 16\)"):
        train(resolved(config, ["model.d_ff=32", "train.steps=20"]), workdir)
    assert_bit_equal(params_of(workdir), before)


def test_live_run_keeps_its_workdir(config, tmp_path):
    with loop.lock(tmp_path), pytest.raises(UserError, match=f"in use by a live run .process {os.getpid()}"):
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
    rows = json.loads(report.read_text())
    assert len(rows) == 8 and {"source", "window", "pieces"} <= rows[0].keys()
    last = Checkpoints(tmp_path).latest()
    assert last is not None and all(np.isfinite(x).all() for x in jax.tree.leaves(params_of(tmp_path, last)))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_at_a_random_step_and_restarted_is_bit_equal(config, recipe, tmp_path):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=120, log_every=1))
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=2))
    path = recipe(config)
    killed = command(path, tmp_path / "killed", devices=2)
    until_step(tmp_path / "killed", random.SystemRandom().randint(7, 60), killed)
    killed.kill()
    killed.communicate()
    kept = Checkpoints(tmp_path / "killed").latest()
    assert kept is not None and 5 <= kept < 120
    again, whole = (command(path, tmp_path / name, devices=2) for name in ("killed", "whole"))
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
    process = command(recipe(config), tmp_path / "run", "checkpoint.every=100000")
    until_step(tmp_path / "run", 3, process)
    process.send_signal(number)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == EXIT_PREEMPTED, out
    (step,) = Checkpoints(tmp_path / "run").steps()
    assert f"stopped at step {step}, checkpoint saved" in out
