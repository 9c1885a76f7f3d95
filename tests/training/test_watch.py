"""What counts as a spike, and what becomes of a verdict."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from lm.data.stream.batches import BatchShape
from lm.training.state import Position
from lm.training.watch import (
    AT_LEAST,
    WINDOW,
    Done,
    Finite,
    NonFiniteLoss,
    Spikes,
    Targets,
    Verdict,
    Watch,
)


def falling(n: int, seed: int = 0) -> np.ndarray:
    """Losses of a healthy run."""
    step = np.arange(n)
    return 2.0 + 6.0 / (1 + step / 40) ** 0.7 + np.random.default_rng(seed).normal(0, 0.05, n)


def test_a_healthy_run_has_none():
    for seed in range(5):
        spikes = Spikes(8.0)
        assert not [x for x in falling(3000, seed) if spikes(float(x))]


def test_distance_is_in_robust_standard_deviations_of_the_losses_before():
    losses = falling(400)
    losses[333] += 1.5
    spikes = Spikes(8.0)
    found = [(i, s) for i, x in enumerate(losses) if (s := spikes(float(x)))]
    ((at, spike),) = found
    before = losses[at - WINDOW : at]
    assert at == 333
    assert spike.median == pytest.approx(np.median(before))
    expected = (losses[at] - np.median(before)) / stats.median_abs_deviation(before, scale="normal")
    assert spike.sigmas == pytest.approx(expected, rel=1e-3)


def test_a_spike_of_many_steps_is_reported_once_and_a_later_one_again():
    losses = falling(600)
    losses[300:320] += 2.0
    losses[500:503] += 2.0
    spikes = Spikes(8.0)
    assert [i for i, x in enumerate(losses) if spikes(float(x))] == [300, 500]


def test_a_loss_that_stays_up_is_a_new_level_and_no_spike_for_ever():
    losses = np.concatenate([falling(300), falling(400, 1)[-1] + np.random.default_rng(2).normal(3, 0.05, 400)])
    spikes = Spikes(8.0)
    assert [i for i, x in enumerate(losses) if spikes(float(x))] == [300]


def test_there_is_nothing_to_compare_with_at_first_and_none_if_not_asked():
    spikes, silent = Spikes(8.0), Spikes(None)
    assert not any(spikes(x) for x in [1.0, 50.0] * (AT_LEAST // 2))
    assert spikes(1e4) is not None
    assert not any(silent(x) for x in [1.0] * 200 + [1e9])


def test_constant_losses_have_no_spread_to_be_measured_by():
    spikes = Spikes(8.0)
    assert not any(spikes(1.0 + 1e-6 * (i % 3)) for i in range(300))
    assert spikes(1.1) is not None


def test_an_observer_reports_goes_on_or_stops_and_the_next_one_still_looks(tmp_path):
    """Verdicts are acted on in the order of steps; the first with an error is raised, and names the checkpoint."""
    looked, said = [], []

    class Odd:
        def look(self, done):
            looked.append((done.step, done.first, done.stop, float(done.metrics["loss"])))
            if done.step == 6:
                return Verdict("step 6 is odd")
            return Verdict("{kept} is kept", error=NonFiniteLoss) if done.step == 7 else None

    last = SimpleNamespace(wait=lambda: None, latest=lambda: 5, folder=tmp_path / "checkpoints")
    watch = Watch([Odd(), Finite(), Targets()], None, (), last, SimpleNamespace(print=said.append))
    shape = BatchShape(4, 4, 8)
    begun = [Done(Position(n, 4 * n), shape, {"loss": n, "grad_norm": 1.0, "tokens": 3}) for n in (4, 5)]
    assert [d.metrics["loss"] for d in watch.look(begun)] == [4, 5]
    assert said == ["step 6 is odd"]
    with pytest.raises(NonFiniteLoss, match="^step 5 is kept$"):
        watch.look([Done(Position(6, 24), shape, {"loss": 6.0, "grad_norm": 1.0, "tokens": 3})])
    assert looked == [(5, 16, 20, 4.0), (6, 20, 24, 5.0), (7, 24, 28, 6.0)]
