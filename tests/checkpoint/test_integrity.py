"""A damaged checkpoint is found, named, and never taken for a whole one."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.checkpoint import Checkpoints, integrity, manager, report
from lm.config import Checkpoint
from lm.errors import UserError
from tests.checkpoint.damage import DAMAGES, array_file, cut, flip, lose, lose_item, spoil_meta
from tests.checkpoint.test_manager import META, abstract, make_state
from tests.permissions import as_nobody, open_to_all

STORED = Path(__file__).parent.parent / "stored" / "run" / "checkpoints" / "4"  # packed, without checksums


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run folder with steps 3 and 6."""
    folder = tmp_path_factory.mktemp("saved")
    with contextlib.closing(Checkpoints(folder, Checkpoint(keep_best=1))) as checkpoints:
        for step in (3, 6):
            state = make_state(step, ema=make_state(step + 1).params)
            checkpoints.save(step, state, META, {"loss": float(step)})
            checkpoints.wait()
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def unseal(step: Path) -> None:
    """Makes it a step of an older version, which had no checksums."""
    (step / "checksums.json").unlink()
    path = step / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))


def digest(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)).hexdigest()


def test_the_checksums_are_those_of_all_files_that_were_written_before_them(saved):
    step = saved / "checkpoints" / "6"
    table = json.loads((step / "checksums.json").read_text())
    files = {str(p.relative_to(step)): p.read_bytes() for p in step.rglob("*") if p.is_file()}
    later = {"checksums.json", "_CHECKPOINT_METADATA", "commit_success.txt"}
    assert table["algorithm"] == "crc32"
    assert table["files"] == {n: [len(c), f"{zlib.crc32(c):08x}"] for n, c in files.items() if n not in later}
    assert integrity.damage(step) is None and integrity.damage(step, depth="quick") is None


@pytest.mark.parametrize("harm", DAMAGES)
def test_every_damage_of_the_newest_step_is_found_and_the_one_before_taken(run, harm):
    folder = run / "checkpoints"
    name = harm(folder / "6")
    before = digest(run)
    checkpoints = Checkpoints(run)
    whole = checkpoints.newest_whole()
    assert whole.step == 3 and list(whole.damaged) == [6]
    assert name in str(whole.damaged[6])
    with pytest.raises(
        UserError, match=r"6.*: expected a whole checkpoint.*step 3 is whole by names and sizes: take --step 3"
    ):
        checkpoints.meta(6), checkpoints.restore(6, abstract(make_state(6, ema=make_state(7).params)))
    state = make_state(3, ema=make_state(4).params)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(3, abstract(state)), state)
    assert digest(run) == before


def test_what_is_wrong_names_the_file_and_the_bytes(run):
    step = run / "checkpoints" / "6"
    assert str(integrity.damage(step)) == "None"
    name = flip(step)
    assert str(integrity.damage(step)).startswith(f"{name}: expected CRC-32 ")
    size = (step / name).stat().st_size
    (step / name).write_bytes(b"x" * (size - 1))
    assert str(integrity.damage(step, depth="quick")) == f"{name}: expected {size} bytes, got {size - 1}"
    (step / name).unlink()
    assert str(integrity.damage(step)) == f"{name}: missing"


def test_a_quick_look_reads_metadata_of_any_size(tmp_path):
    """That of a large vocabulary, in which a byte is changed: what is decided by it must be right."""
    meta = dataclasses.replace(META, tokenizer=bytes(200_000))
    with contextlib.closing(Checkpoints(tmp_path, Checkpoint(keep_last=9))) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), meta)
            checkpoints.wait()
    flip(tmp_path / "checkpoints" / "2", "meta")
    assert "meta/metadata: expected CRC-32" in str(integrity.damage(tmp_path / "checkpoints" / "2", depth="quick"))
    whole = Checkpoints(tmp_path).newest_whole(lambda step: Checkpoints(tmp_path).meta(step))
    assert whole.step == 1 and list(whole.damaged) == [2]


def test_a_step_that_lost_its_checksums_is_none_of_an_older_version(run):
    (run / "checkpoints" / "6" / "checksums.json").unlink()
    assert str(integrity.damage(run / "checkpoints" / "6")) == "checksums.json: missing"


def test_what_passes_is_no_damage_and_nothing_is_set_aside(run, monkeypatch):
    def too_many(folder):
        raise OSError(errno.EMFILE, "Too many open files", str(folder))

    monkeypatch.setattr(integrity, "_files", too_many)
    with pytest.raises(UserError, match="too many open files; raise `ulimit -n`"):
        Checkpoints(run).newest_whole()


def test_damage_elsewhere_does_not_keep_the_weights_from_being_read(run):
    step = run / "checkpoints" / "6"
    flip(step, "train")
    flip(step, "params")
    ema = make_state(7).params
    restored = Checkpoints(run).restore_params(6, abstract(make_state(6, ema=ema)).params)
    jax.tree.map(np.testing.assert_array_equal, restored, ema)
    flip(step, "ema")
    with pytest.raises(UserError, match="ema/.*expected CRC-32"):
        Checkpoints(run).restore_params(6, abstract(make_state(6)).params)


def test_files_without_permission_are_named_as_such(run):
    with open_to_all() as folder:
        shutil.copytree(run, folder / "run")
        (folder / "run").chmod(0o755)
        step = folder / "run" / "checkpoints" / "6"
        path = array_file(step)
        path.chmod(0)
        with as_nobody():
            assert str(integrity.damage(step)) == f"{path.relative_to(step)}: Permission denied"
        (step / "meta").chmod(0)
        with as_nobody():
            assert str(integrity.damage(step)) == "meta: Permission denied"


@pytest.mark.parametrize("harm", [cut, lose, lose_item, spoil_meta])
def test_a_step_without_checksums_is_looked_at_by_names_sizes_and_what_reads_it(tmp_path, harm):
    for unsealed in ("plain", "packed"):
        step = tmp_path / unsealed / "4"
        if unsealed == "packed":
            shutil.copytree(STORED, step)
        else:
            state = make_state(4)
            with contextlib.closing(Checkpoints(tmp_path, Checkpoint())) as checkpoints:
                checkpoints.save(4, state, META)
            (tmp_path / "checkpoints" / "4").rename(tmp_path / "4")
            unseal(tmp_path / "4")
            step.parent.mkdir()
            (tmp_path / "4").rename(step)
        assert integrity.damage(step) is None
        harm(step)
        assert integrity.damage(step) is not None, unsealed


def test_an_older_step_is_restored_and_said_to_have_no_checksums(run, capsys):
    unseal(run / "checkpoints" / "6")
    state = make_state(6, ema=make_state(7).params)
    jax.tree.map(np.testing.assert_array_equal, Checkpoints(run).restore(6, abstract(state)), state)
    assert "/6: saved without checksums" in capsys.readouterr().err


def test_checksums_of_another_kind_are_not_taken_for_damage_of_the_arrays(run):
    path = run / "checkpoints" / "6" / "checksums.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"algorithm": "md17"}))
    before = digest(run)
    with pytest.raises(
        UserError, match="expected checksums of crc32, got 'md17': a newer version has saved it; update"
    ):
        Checkpoints(run).newest_whole()
    assert digest(run) == before


def test_a_save_that_cannot_be_read_back_is_not_kept(tmp_path, monkeypatch):
    seal = integrity.seal

    def lose_one(folder):
        lose(folder)
        return seal(folder)

    with contextlib.closing(Checkpoints(tmp_path, Checkpoint())) as checkpoints:
        checkpoints.save(1, make_state(), META)
        checkpoints.wait()
        monkeypatch.setattr(integrity, "seal", lose_one)
        with pytest.raises(UserError, match=r"2: expected a checkpoint that can be restored, got one with params/.*"):
            checkpoints.save(2, make_state(), META)
            checkpoints.wait()
        assert checkpoints.steps() == [1]


def test_a_step_is_read_again_after_it_was_saved_where_asked(tmp_path, monkeypatch):
    lines: list[str] = []
    with contextlib.closing(Checkpoints(tmp_path, Checkpoint(verify=True), lines.append)) as checkpoints:
        checkpoints.save(1, make_state(), META)
        checkpoints.wait()
        monkeypatch.setattr(manager, "_drop_cached", flip)  # the disk keeps other bytes
        checkpoints.save(2, make_state(), META)
        checkpoints.wait()
    assert lines[0] == "checkpoint of step 1 is as it was saved"
    assert lines[1].startswith("checkpoint of step 2 is damaged: params/") and "expected CRC-32" in lines[1]


def test_the_best_step_is_known_after_a_restart(tmp_path):
    policy = Checkpoint(keep_last=1, keep_best=1)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0)):
        with contextlib.closing(Checkpoints(tmp_path, policy)) as checkpoints:
            checkpoints.save(step, make_state(), META, {"loss": loss})
    assert Checkpoints(tmp_path).steps() == [2, 4]


def test_a_step_that_is_set_aside_is_as_it_was_and_no_step_any_more(run):
    flip(run / "checkpoints" / "6")
    before = digest(run / "checkpoints" / "6")
    checkpoints = Checkpoints(run)
    assert checkpoints.set_aside(6).name == "6.damaged"
    assert checkpoints.steps() == [3]
    assert digest(run / "checkpoints" / "6.damaged") == before
    shutil.copytree(run / "checkpoints" / "3", run / "checkpoints" / "6")
    assert checkpoints.set_aside(6).name == "6.damaged2"
    with contextlib.closing(Checkpoints(run, Checkpoint(keep_last=9))) as saving:
        saving.save(6, make_state(6), META)
    assert checkpoints.steps() == [3, 6]
    assert digest(run / "checkpoints" / "6.damaged") == before


# --- lm checkpoints ---------------------------------------------------------------------------------------------------


def test_list_says_step_items_bytes_and_state(run):
    step = run / "checkpoints" / "6"
    unseal(run / "checkpoints" / "3")
    n_bytes = sum(p.stat().st_size for p in step.rglob("*") if p.is_file())
    lines = report.listing(run).splitlines()
    assert lines[0].split() == ["step", "items", "bytes", "state"]
    assert lines[1].endswith("whole by names and sizes, saved without checksums")
    assert lines[2].split() == [
        "6",
        "ema",
        "meta",
        "metrics",
        "params",
        "train",
        f"{n_bytes:,}",
        *"whole by names and sizes".split(),
    ]
    name = cut(step)
    (run / "checkpoints" / "9.damaged").mkdir()
    lines = report.listing(run).splitlines()
    assert f"damaged: {name}: expected" in lines[2]
    assert lines[3].endswith("9.damaged")


def test_verify_reads_all_and_refuses_at_the_end_what_is_damaged(run):
    assert [line.rpartition(" (")[0] for line in report.verify(run)] == ["step 3: whole", "step 6: whole"]
    name = flip(run / "checkpoints" / "3")
    lines = []
    with pytest.raises(UserError, match="expected whole checkpoints, got damage in step 3;"):
        for line in report.verify(run):
            lines.append(line)
    assert lines[0].startswith(f"step 3: damaged: {name}: expected CRC-32")
    assert lines[1].startswith("step 6: whole")
    assert len(list(report.verify(run, 6))) == 1
    with pytest.raises(UserError, match="no checkpoint of step 5; there are 3, 6"):
        list(report.verify(run, 5))


@pytest.mark.parametrize("look", [report.listing, lambda folder: list(report.verify(folder))])
def test_a_folder_without_checkpoints_is_named(tmp_path, look):
    with pytest.raises(UserError, match="no finished checkpoint here"):
        look(tmp_path)
