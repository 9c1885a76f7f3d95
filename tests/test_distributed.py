"""How far the host may run ahead of its devices."""

import os
import subprocess
import sys

import pytest

from lm.distributed import Pace, initialize
from lm.errors import UserError

# Two devices with one thread each, as `use_cpu_cores` makes them, and more programs than XLA's CPU client can hold.
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from lm.distributed import Pace

jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = jax.device_put(np.ones((64, 256), np.float32), NamedSharding(mesh, PartitionSpec("data")))

@jax.jit
def total(w, x):
    for _ in range(20):
        x = jnp.tanh(x @ w)
    return jnp.sum(x)

w, sums, pace = jax.device_put(np.eye(256, dtype=np.float32), NamedSharding(mesh, PartitionSpec())), [], Pace()
for _ in range(150):
    sums.append(total(w, rows))
    pace(sums[-1])
print(len({float(s) for s in sums}))
"""


class Output:
    """Stands for an array of a device: it counts how often it was waited for."""

    def __init__(self):
        self.waited = 0

    def block_until_ready(self):
        self.waited += 1
        return self


def test_all_but_the_last_few_are_waited_for_in_order():
    outputs, pace = [Output() for _ in range(9)], Pace(3)
    for i, output in enumerate(outputs):
        pace({"loss": output})
        assert [o.waited for o in outputs] == [1] * max(0, i - 2) + [0] * (9 - max(0, i - 2))


@pytest.mark.multiprocess
def test_many_programs_with_collectives_end_on_a_cpu_with_several_devices():
    env = os.environ | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (("here:1", 2, None), "--coordinator, --num-processes and --process-id belong together"),
        (("here", 2, 0), "--coordinator: expected HOST:PORT, got 'here'"),
        ((":1234", 2, 0), "--coordinator: expected HOST:PORT, got ':1234'"),
        (("here:http", 2, 0), "--coordinator: expected HOST:PORT, got 'here:http'"),
        (("here:65536", 2, 0), "--coordinator: expected HOST:PORT, got 'here:65536'"),
        (("here:1234", 0, 0), "--num-processes: expected at least 1, got 0"),
        (("here:1234", 2, 2), "--process-id: expected 0 to 1 of --num-processes 2, got 2"),
        (("here:1234", 2, -1), "--process-id: expected 0 to 1 of --num-processes 2, got -1"),
    ],
)
def test_a_wrong_group_is_refused_before_it_is_waited_for(group, message):
    with pytest.raises(UserError, match=message):
        initialize(*group)


def test_where_jax_detects_no_cluster_the_way_out_is_said(monkeypatch):
    def nothing_found(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", nothing_found)
    with pytest.raises(UserError, match="--distributed: expected a TPU pod, .* give --coordinator HOST:PORT"):
        initialize()
