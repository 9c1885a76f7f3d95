"""A model folder opened: its config understood, every tensor accounted for, nothing read yet but the headers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm.errors import UserError, did_you_mean
from lm.hf.families import known, table
from lm.hf.families.family import TASKS, Family
from lm.hf.families.fields import Fields
from lm.hf.families.table import Slot
from lm.hf.tensors.folder import TensorFolder, open_tensors
from lm.models import Body, Model, SequenceClassification, Task
from lm.models.base import abstract
from lm.models.tasks import Labels, Problem
from lm.nn.param import paths

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

# Of heads that files of a class without one hold all the same, as checkpoints of pre-training do: transformers reads
# none of them either.
HEADS = re.compile(
    r"(cls|predictions|sop_classifier|lm_head|embed_out|score|classifier|qa_outputs|classification_head)\.|final_logits_bias$"
)

N_LABELS = {"bart": 3}  # where config.json says nothing; else 2

PROBLEMS: dict[str, Problem] = {
    "regression": "regression",
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
}


@dataclasses.dataclass(frozen=True)
class Opened:
    """A folder, opened. config, generation: as they are in it. slots: canonical tensor name -> where it goes; stored:
    canonical name -> the name in the files; shapes: of our parameters, by path."""

    folder: Path
    config: dict[str, Any]
    generation: dict[str, Any] | None
    family: Family
    model: Model
    shapes: dict[str, tuple[int, ...]]
    slots: dict[str, Slot]
    stored: dict[str, str]
    tensors: TensorFolder

    def read(self, name: str) -> np.ndarray:
        """A tensor by its canonical name, as it is stored."""
        return self.tensors.read(self.stored[name])

    def without_prefix(self) -> Opened:
        """The names of tensors as a class without a head has them."""
        bare = lambda names: {name.removeprefix(self.family.prefix): value for name, value in names.items()}
        return dataclasses.replace(self, slots=bare(self.slots), stored=bare(self.stored))

    def unused(self) -> dict[str, np.ndarray]:
        """The tensors that the class stores and never reads. Of a class without a head all that are not its own are
        among them, buffers and heads, so that its folder comes back whole."""
        # Copies: they outlive the folder.
        names = self.family.unused(self.model)
        if not isinstance(self.model.task, Body):
            return {name: np.array(self.read(name)) for name in names if name in self.stored}
        bare = [name.removeprefix(self.family.prefix) for name in names]
        buffers = set(self.tensors.names()) - set(self.stored.values())
        read = {name: np.array(self.read(name)) for name in bare if name in self.stored}
        return read | {name: np.array(self.tensors.read(name)) for name in sorted(buffers)}


class _Stored(Mapping):
    """Canonical name -> tensor, read when it is asked for."""

    def __init__(self, tensors: TensorFolder, names: Mapping[str, str]):
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors.read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextlib.contextmanager
def open_folder(folder: str | Path, ignore_fields: Collection[str] = ()) -> Iterator[Opened]:
    """The folder of a model, checked: the config's fields, and names and shapes of all tensors. ignore_fields: names of
    fields that are accepted though nobody here knows them."""
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    family, ending = known.of_config(config, str(folder / CONFIG))
    with open_tensors(folder) as tensors:
        stored = _canonical(tensors, family, folder)
        task = read_task(config, TASKS[ending], str(folder / CONFIG))
        if isinstance(task, Body):
            stored = {name: actual for name, actual in stored.items() if not HEADS.match(name)}
            pooler = any(re.search(r"(^|\.)pooler\.", name) for name in stored)
            task = Body(pooler=pooler, encoder_only=ending == "EncoderModel")
        fields = Fields(config, str(folder / CONFIG), _Stored(tensors, stored), ignore_fields)
        model = read_model(family, fields, task)
        shapes = {path: tuple(leaf.shape) for path, leaf in paths(abstract(model).params).items()}
        others = {*family.unused(model), *family.spare(model)}
        found = {n: tensors.info(actual).shape for n, actual in stored.items() if n not in others}
        slots = _layout(family, model, shapes, found)
        aliases = family.aliases(model)
        table.check(found, slots, aliases, str(folder))
        for alias in aliases:
            if alias.theirs in stored and not np.array_equal(
                tensors.read(stored[alias.theirs]), tensors.read(stored[alias.of])
            ):
                raise UserError(
                    f"{folder}: {alias.theirs}: expected the values of {alias.of}, to which this class ties it, got "
                    "others; the folder is not of this class or was damaged"
                )
        generation = read_json(folder / GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else None
        opened = Opened(folder, config, generation, family, model, shapes, slots, stored, tensors)
        yield opened.without_prefix() if isinstance(task, Body) else opened


def read_model(family: Family, fields: Fields, task: Task) -> Model:
    """The model config that the fields say; errors begin with the file."""
    try:
        model = family.read(fields, task)
    except UserError as e:
        if str(e).startswith(fields.where):
            raise
        raise UserError(f"{fields.where}: {e}") from e
    except (TypeError, ValueError, LookupError, AttributeError) as e:  # of a list or an object with other things in it
        kind = fields.config.get("model_type")
        raise UserError(
            f"{fields.where}: expected the fields of a {kind}, got one of another kind ({e}); take the config.json "
            "that belongs to the weights"
        ) from e
    fields.done()
    return model


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a mark in front
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the folder of a Hugging Face model") from None
    except OSError as e:
        raise UserError(f"{path}: expected a file that can be read, got {e.strerror or e}; mend that") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: expected JSON, got something else ({e}); download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_task(config: Mapping[str, Any], kind: type[Task], where: str) -> Task:
    """The task of a class with the number of its labels."""
    if not issubclass(kind, Labels):
        return kind()
    labels, n = config.get("id2label"), config.get("num_labels")
    if labels is not None:
        if not isinstance(labels, dict | list):
            raise UserError(f"{where}: id2label: expected an object of names, got {labels!r}")
        n = len(labels)  # the names win, as in transformers
    elif n is None:
        n = N_LABELS.get(config["model_type"], 2)
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise UserError(f"{where}: num_labels: expected a positive number, got {n!r}")
    if not issubclass(kind, SequenceClassification):
        return kind(n_labels=n)
    problem = config.get("problem_type")
    if problem is not None and not (isinstance(problem, str) and problem in PROBLEMS):
        raise UserError(
            f"{where}: problem_type: expected one of {', '.join(PROBLEMS)}, got {problem!r}"
            f"{did_you_mean(str(problem), PROBLEMS)}"
        )
    default: Problem = "regression" if n == 1 else "single_label"
    return kind(n_labels=n, problem=PROBLEMS[problem] if problem else default)


def _canonical(tensors: TensorFolder, family: Family, folder: Path) -> dict[str, str]:
    """Name in today's spelling -> name in the files, without buffers."""
    out: dict[str, str] = {}
    for name in tensors.names():
        canonical = family.rename(name)
        if any(re.fullmatch(pattern, canonical) for pattern in family.ignore):
            continue
        if canonical in out:
            raise UserError(
                f"{folder}: {canonical}: expected once, got {out[canonical]} and {name}; the folder mixes two saves"
            )
        out[canonical] = name
    return out


def _layout(family: Family, model: Model, shapes: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Slot]:
    """The layout that the files have, or the usual one for what is then said to be missing."""
    layouts = [table.layout(rows(model), shapes) for rows in (family.table, *family.other_tables)]
    return next((slots for slots in layouts if slots.keys() <= found.keys()), layouts[0])
