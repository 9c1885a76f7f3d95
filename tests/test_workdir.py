"""Where a run is kept: names, addresses, and who may write there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm import workdir as module
from lm.errors import UserError
from lm.workdir import Workdir, read_here, write, written_here
from tests.permissions import as_nobody, open_to_all


@pytest.fixture
def clients(monkeypatch):
    """As where the packages for gs:// are installed; no test here makes them talk."""
    monkeypatch.setattr(module, "_is_installed", lambda package: True)


def names(workdir: Workdir) -> list[str]:
    files = [workdir.config, workdir.metrics, workdir.tensorboard, workdir.checkpoints, workdir.imported]
    return [str(path) for path in (*files, workdir.report("spike", 12))]


NAMES = ["config.json", "metrics.jsonl", "tensorboard", "checkpoints", "hf", "spike_step_12.json"]


def test_files_of_a_run_have_the_same_names_everywhere(clients):
    assert names(Workdir.of("runs/q/")) == [f"runs/q/{name}" for name in NAMES]
    assert names(Workdir.of("gs://bucket/runs/q/")) == [f"gs://bucket/runs/q/{name}" for name in NAMES]


def test_address_is_kept_and_touched_by_nothing(clients, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ("runs/q", Path("runs/q"), "gs://bucket/runs/q"):
        workdir = Workdir.of(address)
        assert str(workdir) == str(address) and Workdir.of(workdir) is workdir
        assert workdir.is_remote == str(address).startswith("gs://")
    assert not list(tmp_path.iterdir())


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(Workdir.of("~/runs/q")) == f"{tmp_path}/runs/q"


@pytest.mark.parametrize(
    "address, says",
    [
        ("s3://bucket/q", ["gs://bucket/folder", "got s3:/", "copy it"]),
        ("az://bucket/q", ["gs://bucket/folder", "got az:/"]),
        ("file:///tmp/q", ["a local folder", "got file:/"]),
        (Path("gs://bucket/q"), ["gs:/bucket/q", "string"]),
        ("gs://bucket", ["gs://bucket/folder", "got no folder"]),
        ("gs://bucket/", ["got no folder"]),
        ("gs:///q", ["gs://bucket/folder"]),
    ],
    ids=str,
)
def test_address_that_no_checkpoint_can_be_written_to_is_refused(clients, address, says):
    with pytest.raises(UserError) as e:
        Workdir.of(address, "train.init_from")
    assert str(e.value).startswith(f"train.init_from: {address}: ")
    assert all(part in str(e.value) for part in says), e.value


def test_store_without_its_packages_is_refused_with_the_extra(monkeypatch):
    monkeypatch.setattr(module, "_is_installed", lambda package: package != "gcsfs")
    with pytest.raises(UserError, match=r"^gs://bucket/q: .*got no gcsfs; pip install 'lm-pretraining\[gcs\]'$"):
        Workdir.of("gs://bucket/q")
    assert Workdir.of("runs/q").path.name == "q"


def test_installed_packages_are_found():
    assert module._is_installed("etils.epath") and not module._is_installed("no_such.package")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="needs the gcs extra")
def test_one_client_reads_and_writes_a_store_in_all_of_the_process():
    code = "import lm; from etils import epath; print(type(epath.Path('gs://b/x')._backend).__name__)"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "_FileSystemSpecBackend"


def test_live_run_keeps_its_folder_and_a_finished_one_gives_it_back(tmp_path):
    workdir = Workdir.of(tmp_path / "deep" / "run")
    with workdir.open():
        with pytest.raises(UserError, match=f"run: in use by a live run .process {os.getpid()}.*; wait for it"):
            with Workdir.of(tmp_path / "deep" / "run").open():
                pass
        assert workdir.lock.exists()
    with workdir.open():
        pass


def test_refused_run_makes_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such thing"), Workdir.of(tmp_path / "deep" / "run").open():
        raise UserError("no such thing")
    assert not list(tmp_path.iterdir())


def test_refused_run_takes_nothing_that_was_there_or_was_written(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError), Workdir.of(tmp_path / "there").open():
        raise UserError("refused")
    with pytest.raises(UserError), Workdir.of(tmp_path / "new").open() as workdir:
        write(workdir.config, "{}")
        raise UserError("refused")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "there"]
    assert workdir.read_config() == "{}"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_text(""), "expected the folder of a run, got a file"),
        (lambda path: (path.parent.rmdir(), path.parent.write_text("")), "got a file, or a path below one"),
        (lambda path: path.symlink_to(path.parent / "gone"), "got a link to .*gone, which is not there"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: (path.mkdir(), (path / "metrics.jsonl").mkdir()), "metrics.jsonl: expected a file of a run"),
        (lambda path: (path.mkdir(), (path / "checkpoints").write_text("")), "checkpoints: expected a folder of a run"),
    ],
)
def test_folder_that_cannot_be_made_or_written_is_refused(tmp_path, make, says):
    path = tmp_path / "inner" / "run"
    path.parent.mkdir()
    make(path)
    with pytest.raises(UserError, match=says), Workdir.of(path).open():
        pass


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.parent.chmod(0), "Permission denied"),
        (lambda path: path.parent.chmod(0o555), "no permission to write there"),
        (lambda path: path.mkdir(0o555), "no permission to write there"),
        (lambda path: (path.mkdir(0o777), path.chmod(0o777), (path / "metrics.jsonl").touch(0o444)), "no permission"),
        (lambda path: (path.mkdir(0o777), path.chmod(0o777), (path / "checkpoints").mkdir(0o555)), "no permission"),
    ],
)
def test_folder_without_permission_is_refused(make, says):
    with open_to_all() as folder:
        path = folder / "inner" / "run"
        path.parent.mkdir(0o755)
        make(path)
        with as_nobody(), pytest.raises(UserError, match=says), Workdir.of(path).open():
            pass
        path.parent.chmod(0o755)


def test_file_is_replaced_whole(tmp_path):
    path = Workdir.of(tmp_path).config
    for text in ("long enough to leave a rest", "é"):
        write(path, text)
        assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_local_folder_is_read_and_written_where_it_is(tmp_path):
    folder = Workdir.of(tmp_path).imported
    with written_here(folder) as here:
        assert here == tmp_path / "hf"
        (here / "x").write_text("1")
    with read_here(folder) as here:
        assert (here / "x").read_text() == "1"
