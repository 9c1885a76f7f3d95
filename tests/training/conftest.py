"""A corpus and a run small enough to train in a test."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lm.config import Checkpoint, Config, Train
from lm.data import Data, SentencePiece, Text, prepare
from lm.mesh import Mesh
from lm.models import Llama
from lm.objectives import CausalLM
from lm.optim import AdamW, Cosine

VOCAB_SIZE = 272


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Data:
    """A prepared corpus of 60 short documents of random words."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshr", k=rng.randint(2, 7))) for _ in range(50)]
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choices(words, k=rng.randint(20, 90))))
    data = Data(
        path=str(folder / "prepared"),
        sources={"words": Text(glob=str(folder / "*.txt"))},
        tokenizer=SentencePiece(vocab_size=VOCAB_SIZE),
        validation_fraction=0.2,
        seq_len=16,
        batch_size=8,
        workers=1,
    )
    prepare(data, progress=False, log=lambda _: None)
    return data


@pytest.fixture
def config(corpus) -> Config:
    return Config(
        model=Llama(vocab_size=VOCAB_SIZE, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24, dropout=0.1),
        data=corpus,
        objective=CausalLM(),
        optim=AdamW(lr=0.01, schedule=Cosine(warmup_steps=3), ema_decay=0.9),
        train=Train(steps=12, log_every=4),
        mesh=Mesh(data=2, fsdp=4),
        checkpoint=Checkpoint(every=5, keep_last=2),
    )


@pytest.fixture
def recipe(tmp_path) -> Callable[[Config], Path]:
    """Writes a config as a recipe file, for a process of its own."""

    def write(config: Config) -> Path:
        path = tmp_path / "recipe.py"
        imports = (
            "from lm.config import *\nfrom lm.config import Checkpoint, Eval\nfrom lm.data import *\n"
            "from lm.mesh import Mesh\nfrom lm.models import *\nfrom lm.objectives import *\nfrom lm.optim import *\n"
            "from lm.nn.rope import *\nfrom lm.sharding import Rules\n"
        )
        path.write_text(f"{imports}config = {config!r}\n")
        return path

    return write
