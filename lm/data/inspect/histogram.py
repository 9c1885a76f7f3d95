"""The lengths of documents as a picture: a panel a store, of how many are how long and which lengths hold the text."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lm.data.inspect.stats import length_histogram
from lm.data.store.tokens import Store
from lm.errors import UserError
from lm.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
MOST_TICKS = 12  # labels below an axis that do not run into each other
FEWEST_BARS = 6  # there is room for: one alone would be a wall
NAME_CHARS = 40  # of a store, above its panel
DOCUMENTS, TOKENS = "#4477aa", "#cc6633"  # apart for every kind of colour vision, and in grey


def write_png(stores: Mapping[str, Store], path: str | Path) -> None:
    """Writes `draw(stores)` as a PNG. UserError for another ending, before anything is read, or where `path` cannot be
    written."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"--png: expected a file that ends in .png, got {str(path)!r}; rename it")
    if not path.parent.is_dir():
        raise UserError(f"--png: expected a folder for {path.name}, got {str(path.parent)!r}, which is none; make it")
    picture = io.BytesIO()
    draw(stores).savefig(picture, format="png", dpi=DPI)
    try:
        write_atomic(path, picture.getvalue())
    except OSError as e:
        raise UserError(f"--png: expected to write {path}, got {e.strerror}; choose another place") from None


def draw(stores: Mapping[str, Store]) -> Figure:
    """A panel for each store, in their order. Bars, on the left axis: documents from one power of two of tokens to the
    next, without their eos. Line, on the right axis: the share of the store's tokens that those documents hold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(stores)
    columns = 1 if n == 1 else 2 if n <= 8 else 3
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(6.4 * columns if n == 1 else 5.2 * columns, 3.6 if n == 1 else 2.9 * rows))
    FigureCanvasAgg(figure)  # without pyplot, which would look for a display
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    for i, (name, store) in enumerate(stores.items()):
        panel = figure.add_subplot(rows, columns, i + 1)
        title = (
            f"{store.n_documents:,} documents, {_short(store.n_tokens)} tokens, "
            f"{store.n_bytes / max(1, store.n_tokens):.2f} bytes/token"
        )
        panel.set_title(f"{_cut(name)}\n", loc="left", fontsize=10, fontweight="bold")
        panel.text(0, 1.03, title, transform=panel.transAxes, fontsize=9, va="bottom")
        _draw_panel(panel, store)
    return figure


def _draw_panel(panel: Axes, store: Store) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    panel.spines["top"].set_visible(False)
    buckets = length_histogram(store)
    if not buckets:
        panel.set(xticks=[], yticks=[])
        panel.spines["right"].set_visible(False)
        panel.text(0.5, 0.5, "no documents", transform=panel.transAxes, ha="center", va="center", color="gray")
        return
    n = len(buckets)
    panel.bar(range(n), [b.documents for b in buckets], width=0.96, align="edge", color=DOCUMENTS)
    panel.set_ylabel("documents", color=DOCUMENTS)
    panel.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _short(int(y))))
    panel.tick_params(axis="y", labelsize=9)

    total = sum(b.tokens for b in buckets)
    shares = panel.twinx()
    shares.spines["top"].set_visible(False)
    centres = [i + 0.48 for i in range(n)]
    shares.plot(centres, [100 * b.tokens / max(1, total) for b in buckets], "o-", ms=4, lw=1.4, color=TOKENS)
    shares.set_ylim(0, 1.06 * max(100 * b.tokens / total for b in buckets) if total else 100)
    shares.set_ylabel("share of tokens", color=TOKENS)
    shares.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    shares.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    shares.tick_params(axis="y", labelsize=9)

    # The edges of the bars: each goes from its label to before the next.
    edges = [b.low for b in buckets] + [buckets[-1].high + 1]
    step = math.ceil(len(edges) / MOST_TICKS)
    panel.set_xticks(range(0, n + 1, step), [_short(e, 1024) for e in edges[::step]])
    around = max(0, FEWEST_BARS - n) / 2
    panel.set_xlim(-0.1 - around, n + 0.06 + around)
    panel.tick_params(axis="x", labelsize=9)
    panel.set_xlabel("tokens in a document")


def _cut(name: str) -> str:
    half = NAME_CHARS // 2
    return name if len(name) <= NAME_CHARS else f"{name[: half - 1]}…{name[-half:]}"


def _short(n: int, base: int = 1000) -> str:
    """Three digits and a unit: 999, 1.23k, 45.6M; in powers of `base`."""
    value, units = float(n), iter(("", "k", "M", "G", "T", "P"))
    unit = next(units)
    while value >= base - (0.5 if unit else 0):  # 999.9 k is written as 1 M
        value, unit = value / base, next(units)
    digits = f"{value:.{max(0, 3 - len(str(int(value))))}f}" if unit else str(n)
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + unit
