"""Raw files found by a pattern: that of glob, `{a,b}` as shells expand it, and `~`. A path that is there is itself,
whatever characters it has.

What matches nothing, or no file, is told from what is there instead. A folder that may not be looked into is refused:
its files would be missed by nobody.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from lm.errors import UserError, did_you_mean
from lm.system_errors import refuse

MOST_ALTERNATIVES = 100_000  # that braces may stand for
LISTED = 4  # suffixes and names that a message shows
PIPES = {
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def find_files(pattern: str, refuse_dead_links: bool = False) -> list[Path]:
    """Files that match a pattern on a local disk, by name. UserError for an empty pattern, and for what may not be
    looked at; with `refuse_dead_links` also for a match that is a link to nothing."""
    literal = _home(pattern)
    if os.path.lexists(literal):
        return _files([literal], refuse_dead_links)
    return _files((m for p in alternatives(literal) for m in _matches(p)), refuse_dead_links)


def find_below(folder: Path, pattern: str) -> list[Path]:
    """As `find_files`, in a folder whose name means itself, and without braces."""
    return _files(_below(str(folder), pattern.split("/")), refuse_dead_links=False)


def _files(matches: Iterable[str], refuse_dead_links: bool) -> list[Path]:
    files = []
    for path in sorted(set(map(Path, matches)), key=lambda path: path.parts):  # as paths sort, but fast
        mode = _mode(path)
        if mode is None and refuse_dead_links and path.is_symlink():
            raise UserError(f"{path}: expected a file, got a link to {os.readlink(path)}, where none is; mend the link")
        if mode is not None and stat.S_ISREG(mode):
            files.append(path)
    return files


def no_files(pattern: str) -> UserError:
    """The error for a pattern that `find_files` finds nothing for: what is there instead, and the way out."""
    path = _home(pattern)
    mode = _mode(Path(path))
    if mode is not None and stat.S_ISDIR(mode):
        folder = path.rstrip("/") or "/"
        if any(os.path.lexists(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json")):
            return UserError(
                f"{pattern}: expected files, got a folder that datasets saved; use HFDataset(path={folder!r})"
            )
        return UserError(
            f"{pattern}: expected files, got a folder with {_held(folder)}; write {folder}/* for the files in it, or "
            f"{folder}/**/*{_usual_suffix(folder)} for all below it"
        )
    others = {m: _mode(m) or 0 for p in alternatives(path) for m in _matches(p)} if mode is None else {path: mode}
    for name, mode in sorted(others.items()):
        if what := next((called for test, called in PIPES.items() if test(mode)), None):
            return UserError(
                f"{name}: expected a file, got {what}, which cannot be read twice; write what it gives to a file and "
                "name that"
            )
    if folders := sorted(name for name, mode in others.items() if stat.S_ISDIR(mode)):
        return UserError(
            f"{pattern}: expected files, got {len(folders)} folders and no file, as {folders[0]}; write "
            f"{pattern.rstrip('/')}/* for the files in them"
        )
    return UserError(f"{pattern}: expected files, got no match in {Path.cwd()}: {_near(path)}; check the glob")


def alternatives(pattern: str) -> list[str]:
    """What the braces of a pattern stand for, as in shells: `{a,b}`, `{1..3}`, `{08..12}`, also inside others. Other
    braces are themselves."""
    found = list(dict.fromkeys(_alternatives(pattern, [MOST_ALTERNATIVES])))
    return found or [pattern]


def _alternatives(pattern: str, left: list[int]) -> Iterator[str]:
    start = pattern.find("{")
    while start >= 0:
        commas, stop = _braces(pattern, start)
        if stop > 0:
            cuts = [start, *commas, stop]
            options = [pattern[a + 1 : b] for a, b in zip(cuts, cuts[1:], strict=False)]
            options = options if commas else _range(options[0])
            if options:
                for option in options:
                    yield from _alternatives(pattern[:start] + option + pattern[stop + 1 :], left)
                return
        start = pattern.find("{", start + 1)
    left[0] -= 1
    if left[0] < 0:
        raise UserError(
            f"{pattern}: expected braces that stand for at most {MOST_ALTERNATIVES} patterns, got more; write a `*`"
        )
    yield pattern


def _braces(pattern: str, start: int) -> tuple[list[int], int]:
    """(the commas of the brace that opens at `start`, where it closes or -1)."""
    depth, commas = 0, list[int]()
    for i in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[i], 0)
        if depth == 0:
            return commas, i
        if depth == 1 and pattern[i] == ",":
            commas.append(i)
    return [], -1


def _range(text: str) -> list[str]:
    """The numbers of `1..3`, with the zeros in front that one of them has."""
    match = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not match:
        return []
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= MOST_ALTERNATIVES:
        raise UserError(f"{{{text}}}: expected at most {MOST_ALTERNATIVES} numbers, got more; write a `*`")
    padded = any(len(n) > 1 and n.startswith("0") for n in match.groups())
    width = max(map(len, match.groups())) if padded else 0
    numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
    return [f"{n:0{width}d}" for n in numbers]


def _home(pattern: str) -> str:
    if not pattern or "\0" in pattern:
        got = "an empty one" if not pattern else f"one with NUL, {pattern!r}"
        raise UserError(f"glob: expected a pattern of files, got {got}; name them, as /data/*.txt")
    if pattern.startswith("~") and not os.path.lexists(pattern):
        return os.path.expanduser(pattern)
    return pattern


def _mode(path: str | Path) -> int | None:
    """What is at a path, None where nothing is. UserError where that may not be known."""
    try:
        return os.stat(path).st_mode
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise refuse(path, e) from None


def _is_folder(path: str) -> bool:
    mode = _mode(path or ".")
    return mode is not None and stat.S_ISDIR(mode)


def _list(folder: str) -> list[str]:
    """The names in a folder; none of what is no folder."""
    try:
        return sorted(os.listdir(folder or "."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        if os.path.basename(folder) == "lost+found":  # of the file system, for root alone
            return []
        raise refuse(folder, e) from None


def _matches(pattern: str) -> Iterator[str]:
    """Matches as glob.glob(recursive=True) does, but for links to a folder above them: glob follows those round and
    round, each file 40 times, and of two such links never ends."""
    names = [name for name in pattern.split("/") if name]
    if names[-1:] == ["**"]:
        names.append("*")
    found = _below("/" if pattern.startswith("/") else "", names)
    yield from filter(os.path.isdir, found) if pattern.endswith("/") else found


def _below(folder: str, names: list[str]) -> Iterator[str]:
    if not names:
        yield folder
        return
    name, rest = names[0], names[1:]
    if name == "**":
        for inner in _folders(folder, tuple(map(str, Path(os.path.realpath(folder)).parents))):
            yield from _below(inner, rest)
        return
    path = os.path.join(folder, name)
    if os.path.lexists(path):
        yield from _below(path, rest)
        return
    if glob.has_magic(name):
        match = re.compile(fnmatch.translate(name)).match
        for found in _list(folder):
            if match(found) and (name.startswith(".") or not found.startswith(".")):
                inner = os.path.join(folder, found)
                yield from _below(inner, rest) if rest else (inner,)


def _folders(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """A folder and all below it, but for hidden ones. above: the real paths of those it is in or was reached by."""
    real = os.path.realpath(folder)
    if real in above or not _is_folder(folder):
        return
    yield folder
    for name in _list(folder):
        if not name.startswith(".") and _is_folder(inner := os.path.join(folder, name)):
            yield from _folders(inner, (*above, real))


def _near(pattern: str) -> str:
    """What is in the folder that a pattern looks in, or the folder that is not there."""
    names = [name for name in alternatives(pattern)[0].split("/") if name]
    folder = "/" if pattern.startswith("/") else ""
    for name in names if pattern.endswith("/") else names[:-1]:
        inner = os.path.join(folder, name)
        if _is_folder(inner):
            folder = inner
            continue
        if glob.has_magic(name):
            break
        folders = [n for n in _list(folder) if os.path.isdir(os.path.join(folder, n))]
        near = did_you_mean(name, folders[:1000]) if folders else ""
        return f"there is no folder {inner}{near}"
    if any("**" in name and name != "**" for name in names):
        return f"`**` has to stand between slashes, as in **/*{_usual_suffix(folder)}"
    return f"{folder or 'this folder'} holds {_held(folder)}"


def _held(folder: str) -> str:
    """Says what a folder holds, by suffix."""
    names = [name for name in _list(folder) if not name.startswith(".")]
    files = [name for name in names if not os.path.isdir(os.path.join(folder, name))]
    if not names:
        return "nothing"
    if not files:
        return f"{len(names)} folders, as {names[0]}"
    suffixes = Counter(os.path.splitext(name)[1] or "without a suffix" for name in files).most_common(LISTED)
    counts = ", ".join(f"{n} {suffix}" for suffix, n in suffixes)
    folders = f" and {len(names) - len(files)} folders" if len(names) > len(files) else ""
    return f"{len(files)} files ({counts}; as {files[0]}){folders}"


def _usual_suffix(folder: str) -> str:
    """The suffix that most files of a folder have, else that of text."""
    suffixes = Counter(os.path.splitext(name)[1] for name in _list(folder) if not name.startswith("."))
    return next((suffix for suffix, _ in suffixes.most_common() if suffix), ".txt")
