import contextlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.checkpoint import Checkpoints, Meta
from lm.config import Checkpoint
from lm.errors import UserError
from lm.training.state import State

META = Meta(config="{}", tokenizer=b"\x00\xff model", examples_seen=48, data={"seed": 0}, versions={"jax": "0"})


def make_state(seed: int = 0, tx=None, ema=None, **params) -> State:
    rng = np.random.default_rng(seed)
    params = params or {"layers": {"q": rng.normal(size=(3, 4))}, "norm": rng.normal(size=5)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    opt = (tx or optax.adamw(1e-3)).init(params)
    return State(jnp.int32(seed), params, opt, ema)


def abstract(state: State) -> State:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)


@pytest.fixture
def checkpoints(tmp_path):
    c = Checkpoints(tmp_path, Checkpoint(keep_last=2))
    yield c
    c.close()


def test_what_is_restored_is_what_was_saved(checkpoints):
    state = make_state(7, ema=make_state(8).params)
    checkpoints.save(7, state, META)
    checkpoints.wait()
    restored = checkpoints.restore(7, abstract(state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert checkpoints.meta(7) == META


def test_weights_alone_are_the_moving_average_where_one_is_kept(checkpoints):
    state, ema = make_state(1), make_state(2).params
    checkpoints.save(1, state, META)
    checkpoints.save(2, state._replace(ema=ema), META)
    checkpoints.wait()
    shapes = abstract(state).params
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(1, shapes), state.params)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(2, shapes), ema)


def test_keeps_the_last_the_every_nth_and_the_best(tmp_path):
    policy = Checkpoint(keep_last=1, keep_every=4, keep_best=1, metric="loss")
    checkpoints = Checkpoints(tmp_path, policy)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0), (5, None), (6, 4.0)):
        checkpoints.save(step, make_state(), META, None if loss is None else {"loss": loss})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 6]
    checkpoints.close()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (make_state(layers={"q": np.ones((4, 4))}, norm=np.ones(5)), r"layers.q is \(3, 4\) here, expected \(4, 4\)"),
        (make_state(layers={"k": np.ones((3, 4))}, norm=np.ones(5)), "layers.k is missing; layers.q is not in this"),
        (make_state(tx=optax.sgd(0.1, momentum=0.9)), "another optimizer"),
        (make_state(ema=make_state().params), "ema: not in this checkpoint, which has params, train"),
    ],
)
def test_another_tree_is_refused_with_its_difference(checkpoints, other, says):
    checkpoints.save(1, make_state(), META)
    checkpoints.wait()
    with pytest.raises(UserError, match=says):
        checkpoints.restore(1, abstract(other))


def test_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(UserError, match="no checkpoints here"):
        Checkpoints(tmp_path / "nothing")


def test_half_written_step_is_not_listed_and_does_not_disturb(tmp_path, checkpoints):
    checkpoints.save(3, make_state(3), META)
    checkpoints.wait()
    half = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "params").write_text("")
    again = Checkpoints(tmp_path, Checkpoint())
    assert again.steps() == [3]
    again.save(4, make_state(4), META)
    again.wait()
    assert again.steps() == [3, 4]
    again.close()


def test_full_disk_says_so_and_keeps_what_was_saved(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of 2 MB cannot be mounted here: needs root on Linux")
    try:
        checkpoints = Checkpoints(disk, Checkpoint(keep_last=5))
        big = make_state(norm=np.random.default_rng(0).normal(size=100_000))  # 1.2 MB with its moments
        checkpoints.save(1, big, META)
        checkpoints.wait()
        with pytest.raises(UserError, match="disk full while saving; steps kept: 1; free space"):
            checkpoints.save(2, big, META)
            checkpoints.wait()
        again = Checkpoints(disk)
        jax.tree.map(np.testing.assert_array_equal, again.restore(1, abstract(big)), big)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("name", ["lr[0.1]", "a*b?", "[", "a b", "{x,y}", "ü"])
def test_a_folder_of_any_name_keeps_what_is_saved_in_it(tmp_path, name):
    state = make_state()
    with contextlib.closing(Checkpoints(tmp_path / name, Checkpoint())) as checkpoints:
        checkpoints.save(3, state, META)
    (tmp_path / name).rename(tmp_path / "moved")
    with contextlib.closing(Checkpoints(tmp_path / "moved")) as again:
        jax.tree.map(np.testing.assert_array_equal, again.restore(3, abstract(state)), state)


def test_what_differs_is_told_by_the_item_and_not_by_the_name_of_the_folder(tmp_path):
    state = make_state()
    with contextlib.closing(Checkpoints(tmp_path / "train", Checkpoint())) as checkpoints:
        checkpoints.save(3, state, META)
        checkpoints.wait()
        with pytest.raises(UserError, match="it was saved by another model"):
            checkpoints.check(3, abstract(make_state(other=np.zeros(3))))
