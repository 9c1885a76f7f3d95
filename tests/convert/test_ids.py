"""Special ids of a folder's files: what disagrees is told, what would be fed and has no row is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import lm
from lm import convert
from lm.errors import UserError
from tests.convert.test_folders import byte_level, command, copied, refusal, saved, spaced_with_start
from tests.halves import slow_but
from tests.hf.cases import CASES
from tests.hf.conftest import cases  # noqa: F401

pytestmark = pytest.mark.hf
pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SPELT = {"gpt2": dict.fromkeys(("bos", "eos"), "<|endoftext|>"), "llama": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """family -> a folder with a tokenizer that fits."""
    made = {}
    for name, raw in (("gpt2", byte_level()), ("llama", spaced_with_start())):
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=raw, **{f"{role}_token": token for role, token in SPELT[name].items()}
        )
        case = CASES[name]
        ids = {"pad_token_id": None, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = getattr(transformers, case.config)(**case.fields | ids | {"vocab_size": len(tokenizer)})
        made[name] = saved(getattr(transformers, case.cls)(config), tmp_path_factory.mktemp(name) / "source")
        tokenizer.save_pretrained(made[name])
    return made.__getitem__


def with_json(source: Path, target: Path, file: str, **fields) -> Path:
    shutil.copytree(source, target)
    path = target / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | fields))
    return target


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_files_that_agree_are_imported_without_a_word(name, folder, tmp_path, capsys):
    assert convert.import_hf(folder(name), tmp_path / "run").notes == ()
    code, out, _ = command(capsys, "import-hf", folder(name), tmp_path / "other")
    assert code == 0 and "note:" not in out


DISAGREE = {
    "config against tokenizer": ("config.json", {"eos_token_id": 7}, "eos_token_id: 7 in config.json, "),
    "generation against both": ("generation_config.json", {"eos_token_id": [5, 7]}, "eos_token_id: .*; generation"),
    "start": ("config.json", {"bos_token_id": 9}, "bos_token_id: 9 in config.json"),
}  # fmt: skip


@pytest.mark.parametrize("what", DISAGREE)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_disagreement_is_told_and_gone_on_with(what, name, folder, tmp_path, capsys):
    file, fields, message = DISAGREE[what]
    source = with_json(folder(name), tmp_path / "source", file, **fields)
    code, out, _ = command(capsys, "import-hf", source, tmp_path / "run")
    (line,) = [line for line in out.splitlines() if line.startswith("note: ")]
    assert code == 0
    assert pytest.importorskip("re").search(message, line)
    run = lm.restore(tmp_path / "run")
    own = run.tokenizer.ids["eos"]
    assert run.config.objective.start_id == own  # documents end with the tokenizer's own
    ends = fields.get("eos_token_id", own)
    assert set(run.generator().end_ids) >= {own, *(ends if isinstance(ends, list) else [ends])}
    assert line.removeprefix("note: ") in command(capsys, "describe", tmp_path / "run")[1]


def test_a_list_that_names_all_is_no_disagreement(folder, tmp_path):
    source = with_json(folder("llama"), tmp_path / "source", "generation_config.json", eos_token_id=[2, 7])
    assert convert.import_hf(source, tmp_path / "run").notes == ()


def grown(source: Path, target: Path, how: str) -> Path:
    """A folder whose tokenizer got a token that the embedding has no row for."""
    if how == "pad_token":
        shutil.copytree(source, target)
        tokenizer = transformers.AutoTokenizer.from_pretrained(target)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(target)
        return target
    if how == "special_tokens_map.json":
        path = with_json(source, target, how, pad_token="[PAD]")
        (path / "tokenizer_config.json").unlink()
        return path
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    path = with_json(source, target, how, **{"[PAD]": size})
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("how", ["pad_token", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_token_without_a_row_is_refused_with_its_name_and_the_way_out(how, name, folder, tmp_path, capsys):
    source = grown(folder(name), tmp_path / "source", how)
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    message = refusal(capsys, "import-hf", source, tmp_path / "run")
    for part in ("tokenizer", f"below {size}", f"got {size}", "'[PAD]'", f"resize_token_embeddings({size + 1})"):
        assert part in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, file, fields",
    [
        ("gpt2", "config.json", {"pad_token_id": 400}),
        ("t5", "config.json", {"decoder_start_token_id": 97}),
        ("t5", "generation_config.json", {"decoder_start_token_id": 500}),
        ("bart", "config.json", {"forced_bos_token_id": 97}),
        ("t5", "config.json", {"bos_token_id": 97, "decoder_start_token_id": None}),
        ("bart", "generation_config.json", {"forced_eos_token_id": [2, 97]}),
        ("transformer", "config.json", {"decoder_start_token_id": 80}),  # of 79 words of its own
    ],
)
def test_an_id_that_would_be_fed_and_has_no_row_is_refused(name, file, fields, cases, tmp_path, capsys):  # noqa: F811
    source = with_json(cases.folder(name), tmp_path / "source", file, **fields)
    if None in fields.values():  # which the other file would name
        (source / "generation_config.json").unlink()
    message = refusal(capsys, "import-hf", source, tmp_path / "run")
    field = next(iter(fields))
    assert f"{file}: {field}: expected an id below" in message and "resize" in message


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("field, value", [("eos_token_id", 400), ("eos_token_id", [0, 500]), ("bos_token_id", 320)])
def test_an_end_or_start_without_a_row_is_refused_where_there_is_a_tokenizer(field, value, file, folder, tmp_path):
    source = with_json(folder("llama"), tmp_path / "source", file, **{field: value})
    own = SPELT["llama"][field.split("_")[0]]
    i = transformers.AutoTokenizer.from_pretrained(source).convert_tokens_to_ids(own)
    with pytest.raises(UserError, match=f"{file}: {field}: expected an id below .*; correct it to {i}, that of"):
        convert.import_hf(source, tmp_path / "run")


def test_an_end_that_no_model_of_this_size_draws_is_told(cases, tmp_path):  # noqa: F811
    source = copied(cases.folder("gpt2"), tmp_path / "source", eos_token_id=50256)
    (source / "generation_config.json").unlink()
    (note,) = convert.import_hf(source, tmp_path / "run").notes
    assert "eos_token_id 50256 lies beyond the 97 rows" in note


@pytest.mark.parametrize("value", ["2", [2, "x"], 2.5, True, {"a": 1}])
def test_ids_of_another_kind_are_refused_in_one_line(value, cases, tmp_path):  # noqa: F811
    source = with_json(cases.folder("llama"), tmp_path / "source", "generation_config.json", eos_token_id=value)
    with pytest.raises(UserError, match="generation_config.json: eos_token_id: expected an id or a list of ids") as e:
        convert.import_hf(source, tmp_path / "run")
    assert "\n" not in str(e.value)


# --- fields that are accepted by name ---------------------------------------------------------------------------------


def test_an_ignored_field_is_remembered_and_comes_back(cases, tmp_path, capsys):  # noqa: F811
    source = copied(cases.folder("llama"), tmp_path / "source", attention_twist=3, other_twist=[1])
    message = refusal(capsys, "import-hf", source, tmp_path / "run")
    options = ["--ignore-field", "attention_twist", "--ignore-field", "other_twist"]
    assert " ".join(options) in message
    code, out, _ = command(capsys, "import-hf", source, tmp_path / "run", *options)
    assert code == 0 and "attention_twist of config.json is ignored" in out
    described = command(capsys, "describe", tmp_path / "run")[1]
    assert "attention_twist, other_twist" in described and "LlamaForCausalLM" in described
    convert.export_hf(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


# --- folders that say little of their tokenizer -----------------------------------------------------------------------


@pytest.mark.parametrize("kept", slow_but(["special_tokens_map.json"], ["", "special_tokens_map.json"]))
@pytest.mark.parametrize("name", slow_but(["llama"], ["gpt2", "llama"]))
def test_a_folder_without_tokenizer_config_is_a_run_that_every_command_reads(kept, name, folder, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(folder(name), source)
    (source / "tokenizer_config.json").unlink()
    if kept:
        (source / kept).write_text(json.dumps({f"{role}_token": token for role, token in SPELT[name].items()}))
    assert command(capsys, "import-hf", source, tmp_path / "run")[0] == 0
    run = lm.restore(tmp_path / "run")
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    assert run.tokenizer.vocab_size == size and run.tokenizer.end_id == run.config.objective.start_id
    assert run.tokenizer.pieces([run.tokenizer.end_id]) == [SPELT[name]["eos"]]
    how = ["--temperature", "0", "--max-new-tokens", "5"]
    assert command(capsys, "generate", tmp_path / "run", "the cat", *how)[0] == 0
    assert command(capsys, "describe", tmp_path / "run")[0] == 0
    convert.export_hf(tmp_path / "run", tmp_path / "out")
    theirs, again = (transformers.AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "out"))
    assert len(again) == len(theirs) == size
    assert again("the cat sat").input_ids == theirs("the cat sat").input_ids
