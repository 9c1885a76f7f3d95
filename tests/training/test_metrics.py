import json

import pytest

from lm import hardware
from lm.models.cost import FlopsPerToken
from lm.training import metrics
from lm.training.log import Log, duration
from lm.training.metrics import Clock, utilisation


def test_utilisation_follows_palm_in_both_conventions():
    # 4 devices of 275 TFLOP/s at 2000 tokens/s of a model of 200 (or 180) GFLOP a token.
    mfu = utilisation(FlopsPerToken(2.0e11, 1.8e11), 2000.0, "TPU v4", 4)
    assert mfu.full == pytest.approx(0.4e15 / 1.1e15)
    assert mfu.causal == pytest.approx(0.36e15 / 1.1e15)


def test_unknown_device_has_no_utilisation():
    assert utilisation(FlopsPerToken(1e9, 1e9), 1.0, "abacus", 1) == (None, None)


def test_more_than_the_peak_is_an_error():
    with pytest.raises(AssertionError, match="peak or timing is wrong"):
        utilisation(FlopsPerToken(1e12, 1e12), 1e6, "TPU v4", 1)


def test_time_is_told_by_phase_and_evaluations_and_saves_are_no_training(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = Clock()
    now[0] += 3.0
    for name, seconds in (("data", 2.0), ("eval", 50.0), ("data", 0.5), ("save", 7.0)):
        assert clock.now[0] is None
        with clock.phase(name):
            assert clock.now == (name, now[0])
            now[0] += seconds
    now[0] += 4.0
    assert clock.training() == 9.5
    assert (clock.spent("data"), clock.spent("eval"), clock.spent("step")) == (2.5, 50.0, 0.0)
    clock.restart()
    now[0] += 2.0
    assert (clock.training(), clock.spent("data")) == (2.0, 0.0)


def test_a_phase_ends_with_the_error_that_ends_it():
    clock = Clock()
    with pytest.raises(KeyError), clock.phase("save"):
        raise KeyError
    assert clock.now[0] is None


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (187, "3:07"), (7509, "2:05:09")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def record(loss: float) -> dict:
    return dict(loss=loss, tokens_per_s=1500.0, mfu=None, mfu_causal=None, lr=1e-3, grad_norm=0.5)


def test_resumed_log_drops_what_the_run_does_again_and_half_lines(tmp_path):
    log = Log(tmp_path, total_steps=9, start_step=0)
    for step in (1, 4, 8):
        log.train(step, 9, record(float(step)), 0.0)
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "st')
    log = Log(tmp_path, total_steps=9, start_step=4)
    log.train(5, 9, record(0.5), 0.0)
    log.close()
    assert [(r["step"], r["loss"]) for r in map(json.loads, path.read_text().splitlines())] == [
        (1, 1.0),
        (4, 4.0),
        (5, 0.5),
    ]


def test_line_says_what_a_person_asks(tmp_path, capsys):
    log = Log(tmp_path, total_steps=9, start_step=0)
    log.train(3, 9, record(2.25), 61.0)
    log.train(4, 9, record(2.25) | {"mfu": 0.5, "mfu_causal": 0.45}, 61.0)
    log.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 3/9  loss 2.2500  1.5k tok/s  mfu n/a  lr 1.00e-03  grad 0.50  eta 1:01"
    assert "mfu 50.0%/45.0%" in second


def test_inactive_log_writes_nothing(tmp_path, capsys):
    log = Log(tmp_path, total_steps=9, start_step=0, active=False)
    log.train(1, 9, record(1.0), 0.0)
    log.print("x")
    log.close()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_peaks_are_flops_per_second():
    assert all(1e13 < peak < 1e16 for peak in hardware.PEAK_FLOPS.values())
