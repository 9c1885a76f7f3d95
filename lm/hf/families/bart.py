"""BART and mBART on disk: Marian's layers with tables of positions and more norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.hf.families.family import Family
from lm.hf.families.fields import Fields
from lm.hf.families.marian import EMBED, HEAD, SHARED, aliases, common, common_fields, norm, rename
from lm.hf.families.marian import table as layers_and_ends
from lm.hf.families.table import Map
from lm.models import Bart, MBart, QuestionAnswering, SequenceClassification, Task

SIDES = ("encoder", "decoder")
VERSION = r"model\.(encoder|decoder)\.version"  # a buffer of fairseq


def fields(f: Fields, task: Task) -> dict[str, Any]:
    f.expect("static_position_embeddings", False, why="the positions of this family are learned")
    f.expect("extra_pos_embeddings", 2, why="tokens are at row 2 and on of the table")
    vocab_size = f.take("vocab_size", default=50_265)
    tied = f.tied(HEAD, SHARED, default=True)
    # Without tie_word_embeddings transformers 5 has three tables, of which it never reads the shared one.
    apart = f.config.get("tie_word_embeddings") is False and all(name in f.stored for name in EMBED.values())
    return common(f, task, pad_id=1) | {
        "vocab_size": vocab_size,
        "target_vocab_size": vocab_size if apart else None,
        "max_positions": f.take("max_position_embeddings", default=1024),
        "tied": tied,
    }


def read(f: Fields, task: Task) -> Bart:
    return Bart(**fields(f, task))


def read_mbart(f: Fields, task: Task) -> MBart:
    return MBart(**fields(f, task))


def write(m: Bart) -> dict[str, Any]:
    return common_fields(m) | {"max_position_embeddings": m.max_positions}


def table(m: Bart) -> list[Map]:
    rows = layers_and_ends(m)
    for side in SIDES:
        rows.append(Map(f"{side}.positions.table", f"model.{side}.embed_positions.weight"))
        rows += norm(f"{side}.embed_norm", f"model.{side}.layernorm_embedding")
        rows += norm(f"{side}.norm", f"model.{side}.layer_norm") if isinstance(m, MBart) else []
    match m.task:
        case SequenceClassification():
            for ours, theirs in (("dense", "dense"), ("out", "out_proj")):
                rows.append(Map(f"labeler.{ours}.kernel", f"classification_head.{theirs}.weight", "o i -> i o"))
                rows.append(Map(f"labeler.{ours}.bias", f"classification_head.{theirs}.bias"))
        case QuestionAnswering():
            rows += [Map("labeler.out.kernel", "qa_outputs.weight", "n d -> d n")]
            rows += [Map("labeler.out.bias", "qa_outputs.bias")]
    return rows


def unused(m: Bart) -> Mapping[str, tuple[int, ...]]:
    return {SHARED: (m.vocab_size, m.d_model)} if m.target_vocab_size else {}


def classes(name: str) -> dict[str, str]:
    ends = ("Model", "ForConditionalGeneration", "ForSequenceClassification", "ForQuestionAnswering")
    return {f"{name}{end}": end for end in ends}


BART_FAMILY = Family(
    model_types=("bart",),
    classes=classes("Bart"),
    read=read,
    write=write,
    table=table,
    aliases=aliases,
    rename=rename,
    ignore=(VERSION,),
    unused=unused,
    shifts_inputs=True,
    prefix="model.",
)
MBART_FAMILY = Family(
    model_types=("mbart",),
    classes=classes("MBart"),
    read=read_mbart,
    write=write,
    table=table,
    aliases=aliases,
    rename=rename,
    ignore=(VERSION,),
    unused=unused,
    shifts_inputs=True,
    prefix="model.",
    wraps_last=True,
)
