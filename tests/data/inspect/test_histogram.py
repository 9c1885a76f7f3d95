"""The picture of `lm data stats`: what is drawn is what is there, and it can be read."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import cli
from lm.data.inspect import histogram, stats
from lm.errors import UserError
from tests.data.conftest import write_store


def panels(figure):
    """(bars, line) of each panel; None without documents."""
    shown = [a for a in figure.axes if a.get_title(loc="left")]
    lines = {tuple(a.get_position().bounds): a.lines[0] for a in figure.axes if a.lines}
    return [(a.patches, lines[tuple(a.get_position().bounds)]) if a.patches else None for a in shown]


def test_bars_are_documents_and_the_line_is_the_share_of_tokens_between_the_edges_below(tmp_path):
    rng = np.random.default_rng(0)
    lengths = {"a": rng.integers(1, 97, 41), "b": np.array([0, 0, 1, 7, 8, 300]), "c": np.array([0, 0])}
    stores = {f"{k}/train": write_store(tmp_path / k, [[[5] * i for i in x]]) for k, x in lengths.items()}
    figure = histogram.draw(stores | {"d/train": write_store(tmp_path / "d", [[]])})
    drawn = panels(figure)
    assert len(drawn) == 4
    assert drawn[3] is None
    edges = [0, 1, *(2**k for k in range(1, 20))]
    for (bars, line), x in zip(drawn, lengths.values(), strict=False):
        documents, _ = np.histogram(x, edges)
        tokens, _ = np.histogram(x, edges, weights=x)
        held = slice(np.flatnonzero(documents)[0], np.flatnonzero(documents)[-1] + 1)
        assert [b.get_height() for b in bars] == documents[held].tolist()
        np.testing.assert_allclose(line.get_ydata(), 100 * tokens[held] / max(1, x.sum()))
        np.testing.assert_allclose(line.get_xdata(), [b.get_x() + b.get_width() / 2 for b in bars])
    axes = [a for a in figure.axes if a.patches]
    for a, x in zip(axes, lengths.values(), strict=True):
        first = 1 << int(x.min()).bit_length() >> 1
        for tick, label in zip(a.get_xticks(), a.get_xticklabels(), strict=True):
            bucket = first.bit_length() + int(tick)
            assert label.get_text() == str(1 << bucket >> 1)


def test_a_panel_says_what_meta_json_says(tmp_path):
    store = write_store(tmp_path / "a", [[[5] * 3, [5] * 1500], [[5] * 2]], n_bytes=1509)
    name = "a_source_with_a_name_that_is_too_long_for_a_title/validation"
    panel = histogram.draw({name: store}).axes[0]
    title, counts = panel.get_title(loc="left").strip(), panel.texts[0].get_text()
    assert counts == "3 documents, 1.51k tokens, 3.00 bytes/token"
    head, _, tail = title.partition("…")
    assert name.startswith(head)
    assert name.endswith(tail)
    assert len(title) <= 40
    assert tail.endswith("/validation")


@given(st.integers(0, 10**17), st.sampled_from([1000, 1024]))
def test_short_numbers_are_the_numbers_to_three_digits(n, base):
    digits, unit = re.fullmatch(r"([\d.]+)([kMGTP]?)", histogram._short(n, base)).groups()
    assert len(digits.replace(".", "")) <= 4
    assert abs(float(digits) * base ** " kMGTP".index(unit or " ") - n) <= 0.006 * n


def test_panels_do_not_overlap_and_nothing_is_outside_the_picture(tmp_path):
    rng = np.random.default_rng(1)
    for n in (1, 2, 8):
        stores = {
            f"{i}_{'name' * i}/validation": write_store(
                tmp_path / f"{n}-{i}", [[[5] * k for k in rng.integers(0, 4 ** (1 + i % 5), 19)]]
            )
            for i in range(n)
        }
        figure = histogram.draw(stores)
        figure.draw_without_rendering()
        left, bottom, right, top = figure.bbox.extents
        boxes = [a.get_tightbbox() for a in figure.axes if a.patches]
        assert len(boxes) == n
        for box in [a.get_tightbbox() for a in figure.axes]:
            assert left <= box.x0 < box.x1 <= right
            assert bottom <= box.y0 < box.y1 <= top
        for i, box in enumerate(boxes):
            assert box.count_overlaps(boxes[:i]) == 0
        for a in (a for a in figure.axes if a.patches):
            labels = [label.get_window_extent() for label in a.get_xticklabels()]
            assert all(x.x1 < y.x0 for x, y in zip(labels, labels[1:], strict=False))


def test_stats_writes_the_picture_and_prints_the_same_text(tmp_path, capsys):
    write_store(tmp_path / "a" / "train", [[[5] * 3, [5] * 9]])
    write_store(tmp_path / "b" / "train", [[[5]]])
    outputs = []
    for more in ([], ["--png", str(tmp_path / "lengths.png")]):
        with pytest.raises(SystemExit) as e:
            cli.main(["data", "stats", str(tmp_path), *more])
        assert e.value.code == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == stats.stats(stats.find_stores(tmp_path)) + "\n"
    content = (tmp_path / "lengths.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    size = histogram.draw(stats.find_stores(tmp_path)).get_size_inches() * histogram.DPI
    assert struct.unpack(">II", content[16:24]) == tuple(np.rint(size).astype(int).tolist())


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    stores = {"a/train": write_store(tmp_path / "a", [[[5] * 3]])}
    (tmp_path / "taken.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for path, message in (
        (tmp_path / "x.jpg", f"--png: expected a file that ends in .png, got '{tmp_path}/x.jpg'; rename it"),
        (tmp_path / "no" / "x.png", f"--png: expected a folder for x.png, got '{tmp_path}/no', which is none; make it"),
        (tmp_path / "taken.png", f"--png: expected to write {tmp_path}/taken.png, got Is a directory; choose another"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            histogram.write_png(stores, path)
    assert sorted(tmp_path.rglob("*")) == before
