"""Two real processes against one."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

import lm
from lm.errors import EXIT_FINISHED
from tests.checkpoint.damage import flip
from tests.processes import free_port, train_command


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_are_one(config, recipe, tmp_path):
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=2, fsdp=2))
    path = recipe(config)
    two, one = tmp_path / "two", tmp_path / "one"

    def run_two() -> list[str]:
        where = f"127.0.0.1:{free_port()}"
        group = ["--coordinator", where, "--num-processes", "2", "--process-id"]
        processes = [train_command(path, two, *group, str(i), devices=2) for i in range(2)]
        outputs = [p.communicate(timeout=300)[0] for p in processes]
        assert [p.returncode for p in processes] == [EXIT_FINISHED] * 2, outputs
        return outputs

    assert "2 process(es)" in run_two()[0]
    alone = train_command(path, one, devices=4)
    output = alone.communicate(timeout=300)[0]
    assert alone.returncode == EXIT_FINISHED, output

    def losses(workdir):
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line).get("loss") or json.loads(line)["total"]["loss"] for line in lines]

    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-4)
    a, b = (jax.device_get(lm.restore(w).params) for w in (two, one))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-3), a, b)

    # Each process reads a part of the files: only one of them sees the damage, and both go back.
    damaged = flip(two / "checkpoints" / "12", "train")
    out = run_two()[0]
    assert "checkpoint of step 12 is damaged: " in out and "resuming at step 10" in out, out
    assert damaged in out or "another process found it damaged" in out
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(lm.restore(two).params), a)
