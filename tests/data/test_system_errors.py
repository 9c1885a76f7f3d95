"""What the system has against a file of a corpus is a line of its own, and no traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lm.data import open_corpus
from lm.data.inspect.stats import find_stores, verify
from lm.data.prepare.scan import ScanJob
from lm.errors import UserError
from lm.system_errors import system_error, system_errors
from tests.data.conftest import sample_texts
from tests.data.prepare.test_prepare import make, quiet, write_jsonl  # noqa: F401
from tests.permissions import as_nobody, let_in


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "main/train/meta.json", "main/train/tokens-00000.bin", "main/train", "main"]
)
def test_a_corpus_that_may_not_be_read_says_so(tmp_path, make, name):  # noqa: F811
    write_jsonl(tmp_path / "raw", sample_texts(40))
    data = make(tokenizer="gone.model")  # which is on another machine
    quiet(make())
    let_in(tmp_path)
    for path in (tmp_path / "corpus").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    path = tmp_path / "corpus" / name
    path.chmod(0)
    try:
        for call in (open_corpus, quiet):
            with as_nobody(), pytest.raises(UserError) as e:
                call(data)
            mode = "a+rx" if path.is_dir() else "a+r"
            assert "got permission denied; " in str(e.value) and f"(chmod {mode} {path})" in str(e.value)
        with as_nobody(), pytest.raises(UserError, match="got permission denied; "):
            list(verify(find_stores(data.path)))
    finally:
        path.chmod(0o755)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "expected room to write it, got no space left on device; make room"),
        (errno.EROFS, "expected a folder that can be written, got a read-only file system; name another"),
        (errno.EIO, "expected a disk that can be read, got input/output error; look at the disk"),
    ],
)
def test_a_disk_is_told_from_a_bug(tmp_path, make, monkeypatch, code, message):  # noqa: F811
    write_jsonl(tmp_path / "raw", sample_texts(40))

    def fail(self):
        raise OSError(code, os.strerror(code), str(tmp_path / "corpus/main"))

    monkeypatch.setattr(ScanJob, "run", fail)
    with pytest.raises(UserError, match=f"{tmp_path}/corpus/main: {message}"):
        quiet(make())


def test_what_is_no_fault_of_a_file_stays_what_it_is():
    for error in (OSError("no number"), OSError(errno.EPIPE, "pipe"), OSError(errno.EINTR, "x", "/tmp"), KeyError(1)):
        with pytest.raises(type(error)) as e, system_errors():
            raise error
        assert e.value is error


def test_a_folder_that_cannot_be_written_says_which_permission(tmp_path):  # noqa: F811
    let_in(tmp_path)
    with as_nobody():
        said = system_error(Path(tmp_path, "new"), PermissionError(errno.EACCES, ""))
    assert said is not None and f"chmod u+w {tmp_path})" in said
