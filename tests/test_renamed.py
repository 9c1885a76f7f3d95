"""Old names of fields in calls, in stored configs and on the command line are those of today."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from lm import codec, renamed
from lm import config as configs
from lm.config import Resolved
from lm.errors import UserError
from lm.models import Compute, Llama
from lm.renamed import Renaming, path_today

MODEL = Llama(vocab_size=53, d_model=12, n_layers=2, n_heads=2, d_ff=20)
OLD = {"model.scan": False, "model.remat": "full", "model.attention_block": 0}
TODAY = Compute(scan=False, remat="full", query_block=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batching:
    size: int
    length: int = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Before(metaclass=Renaming):
    renamed: ClassVar[Mapping[str, str]] = {"width": "length"}

    length: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class After(Before):
    renamed: ClassVar[Mapping[str, str]] = {"batch_size": "batching.size", "row": "batching.length"}

    batching: Batching
    by_name: dict[str, Before] = dataclasses.field(default_factory=dict)


@pytest.fixture(autouse=True)
def unsaid():
    renamed._say.cache_clear()


@pytest.fixture(scope="module")
def quickstart():
    return configs.load("quickstart")


def test_a_call_with_old_names_is_that_with_the_new_ones(capsys):
    old = Llama(**{f.name: getattr(MODEL, f.name) for f in dataclasses.fields(MODEL) if f.name != "compute"} | {
        "scan": False, "remat": "full", "attention_block": 0,
    })  # fmt: skip
    assert old == dataclasses.replace(MODEL, compute=TODAY)
    (line,) = capsys.readouterr().err.splitlines()
    assert "Llama.remat is called Llama.compute.remat now" in line


def test_replacing_an_old_name_keeps_what_stands_beside_it():
    held = dataclasses.replace(MODEL, compute=TODAY)
    assert dataclasses.replace(held, remat="none").compute == dataclasses.replace(TODAY, remat="none")


def test_old_names_may_make_a_part_that_has_no_default_and_those_of_a_base_are_read():
    assert After(batch_size=2, row=5, width=1) == After(batching=Batching(size=2, length=5), length=1)
    assert After(batch_size=2).batching == Batching(size=2)


def test_what_was_stored_with_old_names_is_read_with_one_line(capsys, quickstart):
    tree = json.loads(configs.resolved(quickstart).to_json())
    del tree["config"]["model"]["compute"]
    tree["config"]["model"] |= {path.removeprefix("model."): value for path, value in OLD.items()}
    tree["origins"] |= {"model.remat": "recipe", "model.scan": "command line"}
    found = Resolved.from_json(json.dumps(tree), "config.json")
    assert found.config.model.compute == TODAY
    assert found.origins["model.compute.remat"] == "recipe"
    assert found.origins["model.compute.scan"] == "command line"
    Resolved.from_json(json.dumps(tree), "config.json")
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.attention_block is called model.compute.query_block now" in line


def test_in_a_file_the_new_name_wins():
    assert codec.decode(Before, {"width": 1, "length": 2}) == Before(length=2)


@pytest.mark.parametrize("path, value", OLD.items())
def test_an_old_name_on_the_command_line_is_the_new_one(path, value, capsys, quickstart):
    new = path_today(quickstart, path)
    old, today = (configs.resolved(quickstart, [f"{p}={json.dumps(value)}"]) for p in (path, new))
    assert old == today and old.config.model != quickstart.model
    assert old.origins[new] == "command line" and path not in old.origins
    assert capsys.readouterr().err == f"{path} is called {new} now\n"


def test_an_old_name_in_a_class_call_on_the_command_line_is_read():
    start: Any = After(batching=Batching(size=1), by_name={"a.b": Before()})
    assert codec.override(start, "by_name={c: Before(width=9)}").by_name == {"c": Before(length=9)}
    assert codec.override(start, "batch_size=4", "row=2").batching == Batching(size=4, length=2)
    assert codec.assigned("row=2", start) == {"batching.length"}


def test_a_wrong_value_names_the_field_as_it_is_called_today(quickstart):
    with pytest.raises(UserError, match=r"^model\.compute\.remat: expected one of 'none', .* got 'some'"):
        configs.resolved(quickstart, ["model.remat=some"])
    with pytest.raises(UserError, match=r"^model\.compute\.query_block: expected 0 or"):
        configs.resolved(quickstart, ["model.attention_block=-1"])


def test_paths_without_an_old_name_stay_as_they_are(quickstart):
    for path in codec.flatten(codec.encode(quickstart)):
        assert path_today(quickstart, path) == path


def test_what_changed_since_an_older_version_is_told_by_the_names_of_today(quickstart):
    tree = json.loads(configs.resolved(quickstart).to_json())
    del tree["config"]["model"]["compute"]
    tree["config"]["model"] |= {"scan": True, "remat": "full", "attention_block": 64}
    del tree["config"]["train"]["spike_sigmas"]  # a field that the older version did not have
    assert configs.changes(json.dumps(tree), quickstart) == ["model.compute.remat: 'full' -> 'selective'"]
