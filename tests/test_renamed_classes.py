"""What was stored or written under old names is what it was under the new ones, and one line says so."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, Literal

import pytest

from lm import codec, renamed
from lm.errors import UserError
from lm.renamed import Renaming, formerly, renamed_names


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Base of the goals."""


@formerly("OldGoal", "OlderGoal")
@dataclass(frozen=True, kw_only=True)
class Aim(Goal):
    n: int = 1


@dataclass(frozen=True, kw_only=True)
class Wish(Goal):
    n: int = 1


@formerly("OldStep")
@dataclass(frozen=True, kw_only=True)
class Step:
    until: int


@dataclass(frozen=True, kw_only=True)
class Way(metaclass=Renaming):
    renamed: ClassVar[Mapping[str, str]] = {"plan": "packing"}
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {"packing": {"windows": "split"}}

    packing: Literal["split", "best_fit"] = "split"
    windows: str = "windows"
    goal: Goal = Wish()
    steps: tuple[Step, ...] = ()


@pytest.fixture(autouse=True)
def said():
    renamed._say.cache_clear()


@pytest.mark.parametrize("old", ["OldGoal", "OlderGoal", "lm.some.module.OldGoal"])
def test_a_stored_class_is_read_by_its_old_names(old, capsys):
    short = old.rpartition(".")[2]
    made = codec.decode(Way, {"goal": {"_type": old, "n": 3}, "steps": [{"_type": "OldStep", "until": 4}]})
    assert made == Way(goal=Aim(n=3), steps=(Step(until=4),))
    assert f"goal: {short} is called Aim now\n" in capsys.readouterr().err
    assert codec.encode(made)["goal"]["_type"].endswith("Aim")


def test_the_command_line_takes_old_classes_fields_and_values(capsys):
    made = codec.override(Way(), "goal=OldGoal(n=2)", "steps=(OldStep(until=3), OldStep(until=9))")
    assert made == Way(goal=Aim(n=2), steps=(Step(until=3), Step(until=9)))
    assert codec.override(Way(goal=Wish(n=5)), "goal=OldGoal").goal == Aim(n=5)
    assert codec.override(Way(packing="best_fit"), "plan=windows").packing == "split"
    assert codec.override(Way(packing="best_fit"), "packing=windows").packing == "split"
    assert codec.override(Way(), "plan=best_fit").packing == "best_fit"
    lines = capsys.readouterr().err.splitlines()
    assert {"goal: OldGoal is called Aim now", "Way.packing: 'windows' is called 'split' now"} <= set(lines)
    assert len(lines) == len(set(lines)) == 5  # a line for each, once


def test_values_are_read_in_files_and_calls_and_only_of_their_field():
    assert codec.decode(Way, {"plan": "windows", "windows": "windows"}) == Way(packing="split", windows="windows")
    assert Way(plan="windows", windows="windows") == Way(packing="split", windows="windows")


def test_an_old_class_is_none_below_another_base():
    with pytest.raises(UserError, match="goal: no Goal is called 'OldStep'"):
        codec.override(Way(), "goal=OldStep(until=3)")


def test_nothing_is_said_of_names_of_today(capsys):
    way = Way(packing="best_fit", goal=Aim(n=2), steps=(Step(until=3),))
    assert codec.decode(Way, codec.encode(way)) == codec.override(way, "packing=best_fit", "goal=Aim(n=2)") == way
    assert capsys.readouterr().err == ""


def test_flattened_configs_are_compared_by_names_of_today():
    old = {"goal": {"_type": "lm.somewhere.OldGoal", "n": 1}, "steps": [{"_type": "OldStep", "until": 4}]}
    assert codec.flatten(old) == {"goal._type": "Aim", "goal.n": 1, "steps": [{"_type": "Step", "until": 4}]}
    assert renamed.leaf_today(Way(), "plan", "windows") == ("packing", "split")


def test_an_import_by_an_old_name_says_the_new_one(monkeypatch, capsys):
    module = ModuleType("renamed_here")
    module.New = object()
    module.__getattr__ = renamed_names("renamed_here", {"Old": "New"})
    monkeypatch.setitem(sys.modules, "renamed_here", module)
    from renamed_here import Old

    assert Old is module.New and capsys.readouterr().err == "renamed_here.Old is called New now\n"
    assert not hasattr(module, "Other")
