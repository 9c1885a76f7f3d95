"""A model with several end tokens stops at each of them, whichever file names them and whoever generates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import lm
from lm import convert, hf
from lm.generation import BeamSearch, Sampling
from tests.convert.test_folders import READERS, command, saved, spaced_with_end, spaced_with_start
from tests.halves import slow_but
from tests.hf.cases import CASES

pytestmark = pytest.mark.hf
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NEW = 12
PROMPTS = ["the cat", "a dog, a mat"]


class Made(NamedTuple):
    """The folder of a model, its tokenizer, and what the model writes after the first prompt."""

    folder: Path
    tokenizer: Any
    written: list[int]

    @property
    def ends(self) -> tuple[int, int]:
        """One that the model soon writes, and one that it does not."""
        first, *others = dict.fromkeys(self.written)
        return others[0], next(i for i in range(5, 99) if i not in self.written)


def make(name: str, path: Path) -> Made:
    raw = spaced_with_end() if name == "t5" else spaced_with_start()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    case, size = CASES[name], raw.get_vocab_size()
    fields = case.fields | READERS.get(name, {"pad_token_id": None}) | {"vocab_size": size, "eos_token_id": 2}
    torch.manual_seed(3)
    model = getattr(transformers, case.cls)(getattr(transformers, case.config)(**fields)).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn(x.shape) * 0.3)
    folder = saved(model, path)
    tokenizer.save_pretrained(folder)
    return Made(folder, tokenizer, new_ids(model, tokenizer, PROMPTS[0], eos_token_id=None))


def new_ids(model, tokenizer, prompt: str, **options: Any) -> list[int]:
    encoded = tokenizer(prompt, return_tensors="pt")
    encoded.pop("token_type_ids", None)
    options = {"pad_token_id": 0, "do_sample": False, "max_new_tokens": NEW, "use_cache": False} | options
    out = model.generate(**encoded, **options)[0].tolist()
    return out[1:] if model.config.is_encoder_decoder else out[encoded["input_ids"].shape[1] :]


@pytest.fixture(scope="module", params=slow_but(["llama"], ["llama", "t5"]))
def made(request, tmp_path_factory) -> Made:
    return make(request.param, tmp_path_factory.mktemp(request.param) / "source")


def told(made: Made, target: Path, config: Any, generation: Any) -> Path:
    """A folder whose files name these ends; None: nothing, for generation_config.json no file."""
    folder = Path(shutil.copytree(made.folder, target))
    for file, ends in (("config.json", config), ("generation_config.json", generation)):
        fields = json.loads((folder / file).read_text())
        fields.pop("eos_token_id", None)
        fields |= {} if ends in (None, "silent") else {"eos_token_id": ends}
        (folder / file).write_text(json.dumps(fields))
    if generation is None:
        (folder / "generation_config.json").unlink()
    return folder


# What config.json and generation_config.json say. The first of two is never written: who knows that one alone runs past
# the other.
WHERE = {
    "generation_config.json": lambda early, never: (never, [never, early]),
    "config.json alone": lambda early, never: ([never, early], None),
    "both": lambda early, never: ([never, early], [never, early]),
    "a generation_config.json that names none": lambda early, never: ([never, early], "silent"),
    "one each": lambda early, never: (early, never),
}


@pytest.mark.parametrize("where", WHERE)
def test_the_ends_of_a_run_are_those_that_any_file_names(where, made, tmp_path):
    folder = told(made, tmp_path / "folder", *WHERE[where](*made.ends))
    convert.import_hf(folder, tmp_path / "run")
    own = made.tokenizer.eos_token_id
    assert set(lm.restore(tmp_path / "run").generator().end_ids) == {*made.ends, own}


def test_every_way_to_generate_stops_at_the_first_end_of_several(made, tmp_path):
    early, never = made.ends
    folder = told(made, tmp_path / "folder", *WHERE["a generation_config.json that names none"](early, never))
    convert.import_hf(folder, tmp_path / "run")
    run = lm.restore(tmp_path / "run")
    generator = run.generator()
    settings = {"max_new_tokens": NEW}
    greedy = Sampling(temperature=0.0, **settings)
    prompts = [generator.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert generator.tokens(prompts[:1], greedy) == [made.written[: made.written.index(early)]]
    text = generator(PROMPTS[:1], greedy)[0]
    assert "".join(generator.stream(PROMPTS[0], greedy)) == text
    ways = [greedy, Sampling(seed=4, temperature=2.0, **settings), BeamSearch(beams=3, **settings)]
    for how in ways:
        for row in generator.tokens(prompts, how):
            assert not {early, never} & set(row)


@pytest.mark.slow
def test_the_command_stops_there_too(made, tmp_path, capsys):
    early, never = made.ends
    folder = told(made, tmp_path / "folder", *WHERE["generation_config.json"](early, never))
    assert command(capsys, "import-hf", folder, tmp_path / "run")[0] == 0
    how = ["--temperature", "0", "--max-new-tokens", str(NEW)]
    code, out, _ = command(capsys, "generate", tmp_path / "run", PROMPTS[0], *how)
    text = made.tokenizer.decode(made.written[: made.written.index(early)])
    assert code == 0 and out.rstrip("\n").endswith(text) and len(out) < len(PROMPTS[0]) + len(text) + 3


def test_the_checking_face_stops_as_transformers_and_the_ends_come_back(made, tmp_path):
    folder = told(made, tmp_path / "folder", *WHERE["config.json alone"](*made.ends))
    kind = transformers.AutoModelForSeq2SeqLM if "t5" in str(made.folder) else transformers.AutoModelForCausalLM
    theirs, ours = kind.from_pretrained(folder).eval(), hf.load(folder)
    encoded = made.tokenizer(PROMPTS[0], return_tensors="np").input_ids
    for beams in (1, 3):
        options = {"num_beams": beams, "max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}
        with torch.no_grad():
            expected = theirs.generate(torch.from_numpy(encoded), use_cache=False, **options).numpy()
        np.testing.assert_array_equal(ours.generate(input_ids=encoded, **options), expected)
    convert.import_hf(folder, tmp_path / "run")
    convert.export_hf(tmp_path / "run", tmp_path / "out")
    hf.save(ours, tmp_path / "saved")
    for file in ("config.json", "generation_config.json"):
        before = json.loads((folder / file).read_text()) if (folder / file).is_file() else None
        for out in (tmp_path / "out", tmp_path / "saved"):
            assert (json.loads((out / file).read_text()) if (out / file).is_file() else None) == before
