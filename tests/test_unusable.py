"""Every command over targets that cannot be used: one line, exit code 2, and what was there stays as it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from lm import cli
from tests.permissions import as_nobody

STORED = Path(__file__).parent / "stored" / "run"


def a_file(path: Path) -> None:
    path.write_text("no run")


def an_empty_file(path: Path) -> None:
    path.write_bytes(b"")


def a_binary_file(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


def below_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("a file")


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


def a_loop_of_links(path: Path) -> None:
    path.symlink_to(path)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def a_folder_of_something_else(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("no run")


def a_config_that_is_no_json(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{")


def a_config_that_is_no_text(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_bytes(b"\xff\xfe{}")


def a_config_that_is_a_list(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("[1]")


def a_config_of_another_program(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "lama", "vocab_size": 3}')


def a_config_that_is_a_folder(path: Path) -> None:
    (path / "config.json").mkdir(parents=True)


def checkpoints_that_are_a_file(path: Path) -> None:
    path.mkdir()
    (path / "checkpoints").write_text("")


def an_empty_step(path: Path) -> None:
    shutil.copytree(STORED, path)
    shutil.rmtree(path / "checkpoints" / "4")
    (path / "checkpoints" / "4").mkdir()


def a_step_of_something_else(path: Path) -> None:
    shutil.copytree(STORED, path)
    shutil.rmtree(path / "checkpoints" / "4")
    (path / "checkpoints" / "4" / "meta").mkdir(parents=True)
    (path / "checkpoints" / "4" / "meta" / "metadata").write_text("[]")


def a_step_that_is_a_file(path: Path) -> None:
    shutil.copytree(STORED, path)
    shutil.rmtree(path / "checkpoints" / "4")
    (path / "checkpoints" / "4").write_text("")


def a_step_without_weights(path: Path) -> None:
    shutil.copytree(STORED, path)
    shutil.rmtree(path / "checkpoints" / "4" / "params")
    shutil.rmtree(path / "checkpoints" / "4" / "ema")


TARGETS: list[Callable[[Path], None]] = [
    a_file,
    an_empty_file,
    a_binary_file,
    below_a_file,
    a_dangling_link,
    a_loop_of_links,
    a_pipe,
    a_socket,
    a_folder_of_something_else,
    a_config_that_is_no_json,
    a_config_that_is_no_text,
    a_config_that_is_a_list,
    a_config_of_another_program,
    a_config_that_is_a_folder,
    checkpoints_that_are_a_file,
    an_empty_step,
    a_step_of_something_else,
    a_step_that_is_a_file,
    a_step_without_weights,
]
ADDRESSES = ["s3://bucket/run", "gs://", "gs://bucket", "ftp:/x", "x" * 300, "~nobody-of-this-name/x"]

# How each command is given a target, `T`; what it is asked for in the rest is right.
GIVEN = {
    "train": ["train", "T", "--workdir", "new"],
    "train --workdir": ["train", "recipe.py", "--workdir", "T"],
    "train init_from": ["train", "recipe.py", "--workdir", "new", "train.init_from=T"],
    "train tokenizer": ["train", "recipe.py", "--workdir", "new", "data.path=other", "data.tokenizer=T"],
    "eval": ["eval", "T"],
    "generate": ["generate", "T", "Once"],
    "describe": ["describe", "T"],
    "checkpoints list": ["checkpoints", "list", "T"],
    "checkpoints verify": ["checkpoints", "verify", "T"],
    "prepare": ["prepare", "T"],
    "data preview": ["data", "preview", "T", "--step", "0"],
    "data where": ["data", "where", "T", "--step", "1"],
    "data stats": ["data", "stats", "T"],
    "data verify": ["data", "verify", "T"],
    "import-hf": ["import-hf", "T", "new"],
    "export-hf": ["export-hf", "T", "new"],
    "export-hf to": ["export-hf", "run", "T"],
}
# What can be gone on with after all: a folder to train in, the config of a run whose checkpoints are damaged, what its
# checkpoints say of data and tokenizer where only arrays are.
USABLE = {
    "train --workdir": {a_folder_of_something_else, a_step_that_is_a_file},
    "train tokenizer": {a_step_without_weights},
    "describe": {
        checkpoints_that_are_a_file,
        an_empty_step,
        a_step_of_something_else,
        a_step_that_is_a_file,
        a_step_without_weights,
    },
    "data where": {checkpoints_that_are_a_file, a_step_that_is_a_file, a_step_without_weights},
    "checkpoints list": {an_empty_step, a_step_of_something_else, a_step_without_weights},
}
# A start of `train` takes longer than to look at a folder: all of them are in the slow half.
AT_ONCE = {a_file, a_config_of_another_program, an_empty_step}
CASES = [
    pytest.param(c, t, marks=[pytest.mark.slow] if c.startswith("train") and t not in AT_ONCE else [])
    for c in GIVEN
    for t in TARGETS
    if t not in USABLE.get(c, ())
]


def test_the_walk_has_every_command():
    named = {" ".join(w for w in name.split() if not w.startswith("-")) for name in GIVEN}
    assert {c.name for c in cli.COMMANDS} <= named | set(GIVEN)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working directory with a run, its corpus, and a recipe of them."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(STORED.parent, folder, dirs_exist_ok=True)
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config
    (folder / "recipe.py").write_text(
        "import dataclasses, pathlib\nfrom lm.config import Resolved\nfrom lm.mesh import Mesh\n"
        "config = Resolved.from_json(pathlib.Path('run/config.json').read_text(), 'config.json').config\n"
        "config = dataclasses.replace(config, mesh=Mesh(data=2, fsdp=4))\n"
    )
    return folder


@pytest.fixture
def lm(place, monkeypatch, capsys):
    """Runs a command in this process, in `place`: (exit code, stderr)."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(cli.runs, "stop_on_sigterm", lambda: None)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)

    def run(*argv: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as e:
            cli.main(argv)
        out, err = capsys.readouterr()
        return e.value.code, err

    return run


def digest(folder: Path) -> str:
    files = sorted(
        p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and p.name not in ("run.lock", "lock")
    )
    return hashlib.sha256(b"".join(str(p).encode() + p.read_bytes() for p in files)).hexdigest()


def made(place: Path) -> list[str]:
    """What a command made that it refused; removed."""
    found = [name for name in ("new", "other") if (place / name).exists()]
    for name in found:
        shutil.rmtree(place / name)
    return found


def assert_refused(code: object, err: str, name: str) -> None:
    lines = [line for line in err.splitlines() if "is called" not in line and "without checksums" not in line]
    assert code == 2, err
    assert len(lines) == 1 and lines[0].startswith("lm "), err
    assert "error: " in lines[0] and name in lines[0]


@pytest.mark.parametrize(("command", "target"), CASES)
def test_an_unusable_target_is_one_line(lm, tmp_path, place, command, target):
    path = tmp_path / "inner" / "target"
    path.parent.mkdir()
    target(path)
    before, around = digest(tmp_path), digest(place)
    code, err = lm(*(word.replace("T", str(path), 1) if "T" in word else word for word in GIVEN[command]))
    assert_refused(code, err, "target")
    assert digest(tmp_path) == before and digest(place) == around
    assert not made(place)


@pytest.mark.parametrize("command", GIVEN)
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_unusable_address_is_one_line(lm, place, command, address):
    around = digest(place)
    code, err = lm(*(word.replace("T", address, 1) if "T" in word else word for word in GIVEN[command]))
    assert_refused(code, err, "")
    assert digest(place) == around and not made(place)


@pytest.mark.parametrize("command", GIVEN)
def test_a_target_without_permission_is_one_line(lm, tmp_path, place, command):
    argv = GIVEN[command]
    nowhere = f"nowhere-{command}"  # that of `train --workdir` is a run by now
    lm(*(word.replace("T", nowhere, 1) if "T" in word else word for word in argv))  # imports while it may
    assert not made(place)
    path = tmp_path / "target"
    shutil.copytree(place / "run", path)
    path.chmod(0)
    for folder in place.parents[:2]:
        folder.chmod(0o755)
    place.chmod(0o777)
    with as_nobody():
        code, err = lm(*(word.replace("T", str(path), 1) if "T" in word else word for word in argv))
    path.chmod(0o700)
    made(place)
    assert_refused(code, err, "target")
