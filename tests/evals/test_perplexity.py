import gzip
import lzma
import math

import jax.numpy as jnp
import pytest

from lm.evals.perplexity import Perplexity, compress, evaluate, total
from lm.objectives import Score


def test_sums_over_batches_and_divides_once():
    batches = [{"nll": 3.0, "n": 2.0, "bytes": 5}, {"nll": 1.0, "n": 6.0, "bytes": 11}]

    def score(params, batch, table):
        return Score(jnp.asarray(batch["nll"]), jnp.asarray(batch["n"]), jnp.asarray(batch["bytes"]))

    result = evaluate(score, None, batches, jnp.zeros(3))
    assert (result.nats, result.tokens, result.n_bytes) == (4.0, 8, 16)
    assert result.loss == 0.5
    assert result.perplexity == pytest.approx(math.exp(0.5))
    assert result.bits_per_byte == pytest.approx(4 / math.log(2) / 16)


def test_uniform_bytes_cost_eight_bits():
    assert Perplexity(nats=10 * math.log(256), tokens=10, n_bytes=10).bits_per_byte == pytest.approx(8)


def test_total_weighs_sources_by_their_tokens():
    both = total({"a": Perplexity(8.0, 2, 4), "b": Perplexity(1.0, 7, 3)})
    assert both == Perplexity(9.0, 9, 7)
    assert both.loss == 1.0


def test_compressors_are_gzip_9_and_xz_9():
    text = b"".join(b"line %d of a text\n" % (i * i % 37) for i in range(500))
    result = compress(text)
    assert result.gzip == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text))
    assert result.xz == pytest.approx(8 * len(lzma.compress(text, preset=9)) / len(text))
