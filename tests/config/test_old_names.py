"""Configs, command lines and recipes of an older version are read, and told what things are called now."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import lm.models
from lm import config as configs
from lm import renamed
from lm.config import Resolved
from lm.data import BatchPhase
from lm.models import tasks

CONFIG = Path(__file__).parents[1] / "stored/run/config.json"
TASKS = {
    "Words": tasks.LanguageModeling(),
    "WordsAndPair": tasks.MaskedLMAndPair(),
    "WordsAndReplaced": tasks.MaskedLMAndReplaced(),
    "SequenceLabels": tasks.SequenceClassification(n_labels=3),
    "TokenLabels": tasks.TokenClassification(n_labels=3),
    "Spans": tasks.QuestionAnswering(),
}


def stored(**changed) -> Resolved:
    """The config of the stored run, with fields of its sections replaced as JSON."""
    tree = json.loads(CONFIG.read_text())
    for name, value in changed.items():
        section, _, field = name.partition("__")
        tree["config"][section][field] = value
    return Resolved.from_json(json.dumps(tree), "config.json")


@pytest.mark.parametrize("old", TASKS)
def test_tasks_are_read_by_their_old_names(old):
    labels = {"n_labels": 3} if "Labels" in old else {}
    call = f"model.task={old}({', '.join(f'{k}={v}' for k, v in labels.items())})"
    assert stored(model__task={"_type": old} | labels).config.model.task == TASKS[old]
    assert stored(model__task={"_type": f"lm.models.tasks.{old}"} | labels).config.model.task == TASKS[old]
    assert configs.overridden(stored(), [call]).config.model.task == TASKS[old]


def test_the_packing_and_the_phases_of_batches_are_read_by_their_old_names():
    assert stored(data__plan="best_fit").config.data.packing == "best_fit"
    assert stored(data__plan="windows").config.data.packing == "split"
    over = lambda *o: configs.overridden(stored(), o).config.data
    assert over("data.plan=best_fit").packing == over("data.packing=best_fit").packing == "best_fit"
    assert over("data.plan=windows") == over("data.packing=windows") == over()
    phases = (BatchPhase(until_examples=9, seq_len=6),)
    assert over("data.ramp=(Stage(until_examples=9,seq_len=6),)").ramp == phases
    assert stored(data__ramp=[{"_type": "Stage", "until_examples": 9, "seq_len": 6}]).config.data.ramp == phases


def test_what_was_only_renamed_is_no_change_of_a_run():
    text = CONFIG.read_text()
    assert configs.changes(text, stored().config) == []
    changed = configs.changes(text, configs.overridden(stored(), ["data.plan=best_fit"]).config)
    assert changed == ["data.packing: 'split' -> 'best_fit'"]


@pytest.mark.parametrize(
    ("package", "old", "new"),
    [
        *(("lm.models", old, type(task).__name__) for old, task in TASKS.items()),
        ("lm.models", "Family", "Architecture"),
        ("lm.data", "Ramp", "BatchSchedule"),
        ("lm.data", "Stage", "BatchPhase"),
        ("lm.hf", "Model", "HFModel"),
    ],
)
def test_recipes_that_import_an_old_name_get_what_is_called_otherwise_now(package, old, new, capsys):
    module = importlib.import_module(package)
    renamed._say.cache_clear()
    assert getattr(module, old) is getattr(module, new)
    assert capsys.readouterr().err == f"{package}.{old} is called {new} now\n"


def test_other_names_are_missing_as_ever():
    with pytest.raises(AttributeError, match="module 'lm.models' has no attribute 'Wordz'"):
        lm.models.Wordz  # noqa: B018
