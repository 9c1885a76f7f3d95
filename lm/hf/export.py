"""Writes complete model folders that transformers loads: config, weights, tokenizer, generation settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.errors import UserError
from lm.hf.extras import copy_extras
from lm.hf.face.model import DTYPES, HFModel
from lm.hf.families import known, table
from lm.hf.families.table import Slot
from lm.hf.folder import CONFIG, GENERATION_CONFIG
from lm.hf.tensors.write import write_folder, write_tensors
from lm.hf.weights import write_items
from lm.models import Body, SequenceClassification
from lm.models import Model as ModelConfig
from lm.models.tasks import Labels
from lm.nn.param import paths

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt vocab.txt "
    "spiece.model tokenizer.model sentencepiece.bpe.model source.spm target.spm chat_template.jinja"
).split()
PROBLEMS = {"single_label": "single_label_classification", "multi_label": "multi_label_classification"}


def save(model: HFModel, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a folder as the one `model` came from: each tensor in its own dtype, config and tokenizer as they were."""

    def extra(target: Path) -> None:
        copy_tokenizer(model.folder, target)
        copy_extras(model.folder, target)

    write_model(
        folder,
        config=model.config,
        generation=model.generation_config,
        slots=model.slots,
        flat=paths(model.params),
        dtypes=model.stored_dtypes,
        unused=model.unused,
        extra=extra,
        overwrite=overwrite,
    )


def write_model(
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    slots: Mapping[str, Slot],
    flat: Mapping[str, jax.Array],
    dtypes: Mapping[str, np.dtype],
    unused: Mapping[str, np.ndarray],
    extra: Callable[[Path], None],
    overwrite: bool = False,
) -> None:
    """Writes all of a folder or nothing of it. slots, flat, dtypes: see `lm.hf.weights.write_items`; unused: tensors to
    add as they are; `extra` writes the rest into the folder it is given."""
    infos: dict[str, Any] = {name: (slot.shape, dtypes[name]) for name, slot in slots.items()}
    infos |= {name: (x.shape, x.dtype) for name, x in unused.items()}

    def items():
        yield from write_items(slots, flat, dtypes)
        yield from unused.items()

    with write_folder(folder, overwrite=overwrite) as target:
        write_tensors(target, items(), infos=infos)
        # Sorted, as transformers writes it.
        (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if generation is not None:
            (target / GENERATION_CONFIG).write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n")
        extra(target)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files, byte for byte."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def config_of(model: ModelConfig, dtype: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model that was trained here; `more`: special ids and what else the model config does not say."""
    if dtype not in DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    family, name = known.of_model(model)
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": family.model_types[0],
        "dtype": dtype,
        "is_encoder_decoder": model.family == "encoder_decoder",
    }
    if isinstance(model.task, Labels):
        names = {str(i): f"LABEL_{i}" for i in range(model.task.n_labels)}
        config |= {"id2label": names, "label2id": {label: int(i) for i, label in names.items()}}
    if isinstance(model.task, SequenceClassification):
        config["problem_type"] = PROBLEMS.get(model.task.problem, "regression")
    return config | dict(more) | family.write(model)


def layout_of(
    model: ModelConfig, shapes: Mapping[str, tuple[int, ...]], names: Collection[str] | None = None
) -> dict[str, Slot]:
    """Says where the parameters of `model` go in a folder; names: of its tensors, if it is not the usual one."""
    family, _ = known.of_model(model)
    bare = family.prefix if isinstance(model.task, Body) else ""
    for rows in (family.table, *family.other_tables):
        slots = {n.removeprefix(bare): slot for n, slot in table.layout(rows(model), shapes).items()}
        if names is None or slots.keys() == set(names):
            return slots
    raise AssertionError(f"no layout of a {type(model).__name__} has the tensors {sorted(names or ())[:3]} ...")
