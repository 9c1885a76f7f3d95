"""A small text, a tokenizer for it, and stores made by hand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lm.data import SentencePiece, Store, Tokenizer
from lm.data.store.tokens import ShardWriter, StoreMeta, write_meta

SYLLABLES = (
    "def re turn the of mo del to ken da ta self sha pe ba tch if not in for x y 0 1 == na ïve grö ße 東京".split()
)


def sample_texts(n: int, seed: int = 0, words: int = 60) -> list[str]:
    """n different documents of some 300 bytes."""
    rng = random.Random(seed)
    word = lambda: "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3))) + rng.choice("   \n")
    return [f"{i} " + "".join(word() for _ in range(words)) for i in range(n)]


def write_store(
    folder: Path, shards: list[list[list[int]]], *, dtype: str = "<u2", tokenizer: str = "test", n_bytes: int = 7
) -> Store:
    """A store of the given documents (token ids without eos), shard by shard."""
    done = []
    for i, documents in enumerate(shards):
        with ShardWriter(folder, i, dtype) as writer:
            for ids in documents:
                writer.add(ids, n_bytes)
            done.append(writer.finish())
    meta = dict(dtype=dtype, tokenizer=tokenizer, corpus="test", made_from={}, raw=None, counts={})
    write_meta(folder, StoreMeta(**meta, shards=tuple(done)))
    return Store(folder)


def random_store(folder: Path, n_tokens: int, *, n_shards: int = 3, seed: int = 0, **kw) -> Store:
    """Documents of 1 to 40 tokens, about n_tokens in all."""
    rng = random.Random(seed)
    shards = [[] for _ in range(n_shards)]
    for shard in shards:
        size = 0
        while size < n_tokens / n_shards:
            shard.append([rng.randrange(3, 500) for _ in range(rng.randint(1, 40))])
            size += len(shard[-1]) + 1
    return write_store(folder, shards, **kw)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return SentencePiece(kind="bpe", vocab_size=420).train(sample_texts(200))


@pytest.fixture(scope="session")
def tokenizer_path(tokenizer, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(tokenizer.to_bytes())
    return str(path)
