"""A run and its corpus that an older version of this code wrote go on as if it were theirs.

`stored/` is a small Llama with a moving average, trained for 4 steps on one device, and the corpus it read, without its
raw text. The numbers below are what the version that wrote it made of it.
"""

import json
import shutil
from pathlib import Path

import pytest

import lm
from lm import codec
from lm import config as configs
from lm.config import Resolved
from lm.data import open_corpus
from lm.evals.evaluate import Validation
from lm.generation import Sampling
from lm.renamed import leaf_today, path_today
from lm.training import train

STORED = Path(__file__).parent / "stored"
MESH = ("mesh.data=2", "mesh.fsdp=4")
EVALUATED = 5.5892  # at step 4
RESUMED = {5: (5.418766, 0.976379), 6: (5.346260, 0.754459)}  # step: loss, grad_norm
WRITTEN = "\x1cp\ufffd\ufffdE\ufffd}E"  # after "eta", greedily


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A copy of the stored folder, as the working directory: its paths are relative."""
    shutil.copytree(STORED, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Path("run")


def stored(run: Path) -> Resolved:
    return Resolved.from_json((run / "config.json").read_text(), "config.json")


def records(run: Path, kind: str) -> dict[int, dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if line["kind"] == kind}


def test_its_config_says_the_same_under_the_names_of_today(run):
    text = (run / "config.json").read_text()
    tree = json.loads(text)
    assert '"lm.models.llama.Llama"' in text and "lm." not in stored(run).to_json()
    config = stored(run).config
    again = codec.flatten(codec.encode(config))
    then = dict(leaf_today(config, path, value) for path, value in codec.flatten(tree["config"]).items())
    assert {path: again[path] for path in then} == then
    assert not configs.changes(json.dumps(tree), config)  # what it did not have yet is as it is by default
    assert stored(run).origins == {path_today(config, path): origin for path, origin in tree["origins"].items()}
    assert "model.attention_block" in tree["origins"] and "model.attention_block" not in stored(run).origins


def test_it_is_described(run):
    from lm.describe import describe

    assert "parameters        2,436" in describe(str(run))


def test_it_is_evaluated_and_generates(run):
    restored = lm.restore(run)
    results = Validation.make(restored.setup, open_corpus(restored.config.data))(restored.params)
    assert results["words"].loss == pytest.approx(EVALUATED, abs=1e-4)
    assert restored.generator()(["eta"], Sampling(max_new_tokens=8, temperature=0.0)) == [WRITTEN]


def test_it_is_resumed_on_its_corpus(run, capsys):
    made = {path: path.stat().st_mtime_ns for path in Path("corpus").rglob("*.*")}
    train.train(configs.overridden(stored(run), ["train.steps=6", *MESH]), run)
    found = records(run, "train")
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    for step, numbers in RESUMED.items():
        assert (found[step]["loss"], found[step]["grad_norm"]) == pytest.approx(numbers, rel=1e-4), step
    assert records(run, "eval").keys() == {4, 6}
    assert made == {path: path.stat().st_mtime_ns for path in made}
    changed = [line.split(":")[1].strip() for line in capsys.readouterr().out.splitlines() if "changed since" in line]
    assert sorted(changed) == ["mesh.data", "mesh.fsdp", "train.steps"]
