"""Mistakes in what a corpus is named after end in one line, whatever library raises what."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from lm.data import Jsonl, Phase, SentencePiece, prepare
from lm.data.sources.files import download
from lm.data.tokenizer.open import open_tokenizer
from lm.errors import UserError
from lm.evals.evaluate import Validation
from lm.objectives import CausalLM
from tests.data.conftest import sample_texts
from tests.data.prepare.test_prepare import make  # noqa: F401


@pytest.mark.parametrize("glob", ["https://example.invalid/x.txt", "foo://b/x.txt"])
def test_a_glob_of_a_scheme_that_is_not_known_is_refused(tmp_path, glob):
    with pytest.raises(UserError, match="expected a store that can be listed"):
        download(glob, tmp_path, print)


def test_errors_that_only_a_store_knows_are_refused(tmp_path, monkeypatch):
    from etils import epath

    class Odd(Exception):
        pass

    def fail(path):
        raise Odd("no such filesystem\nmore")

    monkeypatch.setattr(epath, "Path", fail)
    with pytest.raises(UserError, match="got no such filesystem;"):
        download("gs://b/*.txt", tmp_path, print)


def test_a_tokenizer_of_a_scheme_that_is_not_known_is_refused():
    with pytest.raises(UserError, match="data.tokenizer: https://hf.co/x: expected a local folder or gs://"):
        open_tokenizer("https://hf.co/x")


def corpus(make, tmp_path, **changes):  # noqa: F811
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in sample_texts(50, seed=0)))
    return dataclasses.replace(make(sources={"m": Jsonl(glob=f"{tmp_path}/raw.jsonl")}), **changes)


@pytest.mark.parametrize("w", [-1.0, 0.0, float("nan"), float("inf")])
def test_weights_are_checked_with_the_config(make, tmp_path, w):  # noqa: F811
    for weights in ({"m": w}, (Phase(until_examples=9, weights={"m": 1.0}), Phase(weights={"m": w}))):
        with pytest.raises(UserError, match="data.weights: expected positive numbers"):
            corpus(make, tmp_path, weights=weights)


def test_no_source_has_the_name_of_a_file_of_the_corpus(make, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="expected names fit for a folder"):
        make(sources={"tokenizer.json": Jsonl(glob=f"{tmp_path}/x")})


@pytest.mark.parametrize("content", ["{", "[]"])
def test_settings_of_the_tokenizer_that_are_damaged_are_refused(make, tmp_path, content):  # noqa: F811
    data = corpus(make, tmp_path, tokenizer=SentencePiece(vocab_size=300))
    prepare(data, progress=False, log=lambda line: None)
    Path(data.path, "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer.json: expected the settings"):
        prepare(data, progress=False, log=lambda line: None)


def test_a_path_that_is_a_file_is_refused(make, tmp_path):  # noqa: F811
    data = corpus(make, tmp_path, path=str(tmp_path / "raw.jsonl"))
    with pytest.raises(UserError, match="data.path: expected a folder that can be made"):
        prepare(data, progress=False, log=lambda line: None)


def test_errors_are_skipped_in_files_whose_names_are_no_utf8(make, tmp_path):  # noqa: F811
    data = corpus(make, tmp_path, on_error="skip")
    os.rename(tmp_path / "raw.jsonl", os.fsencode(tmp_path) + b"/raw\xff.jsonl")
    with open(os.fsencode(tmp_path) + b"/raw\xff.jsonl", "a") as f:
        f.write("{bad\n")
    data = dataclasses.replace(data, sources={"m": Jsonl(glob=f"{tmp_path}/raw*.jsonl")})
    store = prepare(data, progress=False, log=lambda line: None).train["m"]
    assert store.meta.counts["bad_json"] == 1


def test_a_validation_store_that_changed_is_not_evaluated(make, tmp_path):  # noqa: F811
    opened = prepare(corpus(make, tmp_path, validation_fraction=0.3), progress=False, log=lambda line: None)
    os.truncate(opened.validation["m"].path / "tokens-00000.bin", 10)
    validation = Validation(
        score=None,
        corpus=opened,
        objective=CausalLM(),
        seq_len=8,
        batch_size=8,
        vocab_size=opened.tokenizer.vocab_size,
        max_batches=0,
        sharding=None,
    )
    with pytest.raises(UserError, match="changed under a live run"):
        validation({})
