import gzip
import lzma
import math

import jax.numpy as jnp
import pytest

from lm.evals.perplexity import Perplexity, compress, evaluate, total, totals
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


def test_the_sums_of_rows_are_added_over_a_batch():
    score = lambda params, batch, table: Score(params * batch["x"], batch["x"] > 1, table[batch["x"]])
    found = totals(score)(2, {"x": jnp.array([1, 2, 3])}, jnp.array([0, 5, 7, 11]))
    assert tuple(map(int, found)) == (12, 2, 23)


def test_uniform_bytes_cost_eight_bits():
    assert Perplexity(nats=10 * math.log(256), tokens=10, n_bytes=10).bits_per_byte == pytest.approx(8)


def test_total_weighs_sources_by_their_tokens():
    both = total({"a": Perplexity(8.0, 2, 4), "b": Perplexity(1.0, 7, 3)})
    assert both == Perplexity(9.0, 9, 7)
    assert both.loss == 1.0


def test_only_the_loss_of_all_tokens_from_those_before_is_a_length_of_the_text():
    masked = total({"a": Perplexity(8.0, 2, 4, "masked token"), "b": Perplexity(1.0, 7, 3, "masked token")})
    assert masked.unit == "masked token" and masked.bits_per_byte is None
    assert masked.record() == {"loss": 1.0, "perplexity": pytest.approx(math.e), "tokens": 9, "bytes": 7}
    assert Perplexity(8.0, 2, 4).record()["bits_per_byte"] == pytest.approx(2 / math.log(2))


def test_no_loss_is_told_of_what_was_not_predicted():
    assert Perplexity(0.0, 0, 0, "target").record() == {"tokens": 0, "bytes": 0}
    assert str(Perplexity(0.0, 0, 0, "target")) == "nothing to predict (0 targets)"
    assert str(Perplexity(6.0, 3, 0, "target")) == "loss 2.0000 per target  perplexity 7.39  (3 targets)"
    assert str(Perplexity(3.0, 3, 2)) == "loss 1.0000  perplexity 2.72  bits/byte 2.1640  (3 tokens)"


def test_compressors_are_gzip_9_and_xz_9():
    text = b"".join(b"line %d of a text\n" % (i * i % 37) for i in range(500))
    result = compress(text)
    assert result.gzip == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text))
    assert result.xz == pytest.approx(8 * len(lzma.compress(text, preset=9)) / len(text))
