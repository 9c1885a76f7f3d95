"""Which files a pattern stands for, and what is said where it stands for none."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from etils import epath

from lm.data import Jsonl, Parquet, Text
from lm.data.sources.find import alternatives, find_files, no_files
from lm.errors import UserError


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names(pattern: str) -> list[str]:
    return [os.path.relpath(p) for p in find_files(pattern)]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["a[1].txt", "a*.txt", "a?.txt", "a{b,c}.txt", "a[!x].txt", "~a.txt", "a{1..2}.txt"])
def test_a_path_that_is_there_is_itself(here, name):
    write(here, name, "a1.txt", "ab.txt", "ac.txt", "a2.txt", "aa.txt")
    for pattern in (name, f"{here}/{name}", f"./{name}"):
        assert names(pattern) == [name]


@pytest.mark.parametrize("folder", ["lr[0.1]", "x*", "wh?t", "{a,b}", "[", "a]b["])
def test_a_folder_that_is_there_is_itself_in_a_pattern(here, folder):
    write(here, f"{folder}/a.txt", f"{folder}/deep/b.txt", "lr0/a.txt", "xy/a.txt", "what/a.txt", "a/a.txt")
    pattern = f"{folder}/*.txt" if "{" not in folder else f"{here}/{folder}/a.txt"
    assert names(pattern) == [f"{folder}/a.txt"]
    if "{" not in folder:
        assert names(f"{folder}/**/*.txt") == [f"{folder}/a.txt", f"{folder}/deep/b.txt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{a,b}", ["a", "b"]),
        ("x{a,b}y{1,2}", ["xay1", "xay2", "xby1", "xby2"]),
        ("{a,b{c,d}}", ["a", "bc", "bd"]),
        ("a{,.gz}", ["a", "a.gz"]),
        ("{1..3}", ["1", "2", "3"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{000..2}", ["000", "001", "002"]),
        ("{a}", ["{a}"]),
        ("{}", ["{}"]),
        ("{a,b", ["{a,b"]),
        ("a}{b,c}", ["a}b", "a}c"]),
        ("{x{a,b}", ["{xa", "{xb"]),
        ("{{a,b},c}", ["a", "b", "c"]),
        ("{a,a}", ["a"]),
    ],
)
def test_braces_are_expanded_as_shells_do(pattern, expected):
    assert alternatives(pattern) == expected


def test_braces_without_end_are_refused():
    for pattern in ("{1..9999999999}", "{1..999}{1..999}", "{0..99999}{a,b}"):
        with pytest.raises(UserError, match="at most 100000 .*, got more; write a `\\*`"):
            alternatives(pattern)


def test_patterns_find_what_they_say(here, monkeypatch):
    write(here, "b/2.txt", "a/1.txt", "a/1.md", "a/.hidden.txt", ".h/x.txt", "c/d/3.txt")
    monkeypatch.setenv("HOME", str(here))
    for pattern, expected in {
        "{a,b}/*.txt": ["a/1.txt", "b/2.txt"],
        "a/*.{txt,md,csv}": ["a/1.md", "a/1.txt"],
        "[ab]/?.txt": ["a/1.txt", "b/2.txt"],
        "**/*.txt": ["a/1.txt", "b/2.txt", "c/d/3.txt"],
        "**": ["a/1.md", "a/1.txt", "b/2.txt", "c/d/3.txt"],
        "c/**": ["c/d/3.txt"],
        "**/d/**/*.txt": ["c/d/3.txt"],
        "a/.*": ["a/.hidden.txt"],
        ".h/*": [".h/x.txt"],
        "~/a/*.txt": ["a/1.txt"],
        "a//1.txt": ["a/1.txt"],
        "*/": [],
        "a/1.txt/": [],
        "a/1.txt/*": [],
    }.items():
        assert names(pattern) == expected, pattern


def said(pattern: str, source=Text) -> str:
    with pytest.raises(UserError) as e:
        source(glob=pattern).parts(Path())
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_folder_says_how_to_write_its_files(here):
    write(here, "books/a.txt", "books/b.txt", "books/c.md", "books/d/e.txt")
    for pattern in ("books", "books/", f"{here}/books"):
        for source in (Text, Jsonl, Parquet):
            message = said(pattern, source)
            folder = pattern.rstrip("/")
            assert (
                f"{pattern}: expected files, got a folder with 3 files (2 .txt, 1 .md; as a.txt) and 1 fold" in message
            )
            assert f"; write {folder}/* for the files in it, or {folder}/**/*.txt for all below it" in message
    assert "got 1 folders and no file, as books; write b*/* for the files in them" in said("b*")
    write(here, "saved/state.json")
    assert "saved: expected files, got a folder that datasets saved; use HFDataset(path='saved')" in said(
        "saved", Parquet
    )


def test_what_can_be_read_once_alone_is_refused(here):
    os.mkfifo("pipe")
    (here / "link").symlink_to("pipe")
    assert "pipe: expected a file, got a pipe" in said("p*")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket")
        for pattern, what in {
            "pipe": "a pipe",
            "link": "a pipe",
            "socket": "a socket",
            "/dev/null": "a device",
        }.items():
            assert f"{pattern}: expected a file, got {what}, which cannot be read twice; write what" in said(pattern)


def test_an_empty_pattern_is_refused():
    for pattern, got in (("", "got an empty one"), ("a\0b", "got one with NUL")):
        assert f"glob: expected a pattern of files, {got}" in said(pattern)


def test_no_match_shows_what_is_near(here):
    write(here, "data/a.jsonl.gz", "data/b.jsonl.gz", "data/c.md", "data/part/x")
    for pattern, near in {
        "data/*.txt": "data holds 3 files (2 .gz, 1 .md; as a.jsonl.gz) and 1 folders; check the glob",
        "data/*.GZ": "data holds 3 files",
        "dat/*.txt": "there is no folder dat; did you mean 'data'?; check the glob",
        "data/parts/*": "there is no folder data/parts; did you mean 'part'?",
        "*.txt": "this folder holds 1 folders, as data",
        "data/**.nothing": "`**` has to stand between slashes, as in **/*.gz",
        "{x,y}/*.txt": "there is no folder x",
        "dota/": "there is no folder dota; did you mean 'data'?",
        "data/part/*.txt": "data/part holds 1 files (1 without a suffix; as x)",
    }.items():
        assert f"{pattern}: expected files, got no match in {here}: " in said(pattern)
        assert near in said(pattern), pattern


def test_a_link_that_leads_to_itself_is_a_dead_link(here):
    (here / "a.txt").symlink_to("a.txt")
    with pytest.raises(UserError, match="a.txt: expected a file, got a link to a.txt, where none is; mend the link"):
        find_files("*.txt", refuse_dead_links=True)
    assert find_files("*.txt") == []
    assert "no match" in str(no_files("a.txt"))


def test_patterns_in_an_object_store_are_the_same(tmp_path, monkeypatch):
    far, cache = tmp_path / "far", tmp_path / "cache[1]{x,y}*"
    write(far, "a/x.txt", "b/x.txt", "c/x.txt", "c/y[1].txt", "c/y1.txt")
    real = epath.Path
    monkeypatch.setattr(epath, "Path", lambda p: real(str(p).replace("gs://bucket", str(far))))
    for pattern, expected in {
        "gs://bucket/{a,b}/*.txt": ["a/x.txt", "b/x.txt"],
        "gs://bucket/{a,c}/x.txt": ["a/x.txt", "c/x.txt"],
        "gs://bucket/c/y[1].txt": ["c/y[1].txt"],
    }.items():
        source = Text(glob=pattern)
        source.fetch(cache, lambda line: None)
        assert [p.path for p in source.parts(cache)] == [f"{cache}/gs/bucket/{name}" for name in expected], pattern
    (far / "a/x.txt").unlink()
    source = Text(glob="gs://bucket/{a,b}/*.txt")
    source.fetch(cache, lambda line: None)
    assert [p.path for p in source.parts(cache)] == [f"{cache}/gs/bucket/b/x.txt"]
