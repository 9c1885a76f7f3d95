"""What `prepare` did with each entry of a source: `<path>/<source>/report.json`, and lines for the log."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.data.documents.overlap import Evaluation, Overlap
from lm.data.prepare.scan import EXAMPLES
from lm.data.prepare.select import Near, Selection
from lm.data.store.splits import DROP, SPLITS
from lm.files import write_atomic


def report_of(
    selection: Selection, near: Near | None, overlap: Overlap | None, evaluations: Mapping[str, Evaluation]
) -> dict[str, Any]:
    """read = kept in the splits + left out by reason, in entries: a document, or what stands where one should be (a
    line that is no JSON, the rest of a file that breaks off). as_read: what was done to come by text, such as the byte
    order marks that were dropped."""
    scans, left_out = selection.scans, selection.left_out()
    kept = {split: int((selection.labels == label).sum()) for split, label in SPLITS.items()}
    examples: dict[str, list[str]] = {}
    for scan in scans:
        for reason, places in scan.examples.items():
            examples[reason] = (examples.get(reason, []) + places)[:EXAMPLES]
    report: dict[str, Any] = {
        "source": selection.name,
        "read": len(selection.labels),
        "kept": kept,
        "left_out": left_out,
        "invalid_utf8_mended": sum(s.n_mended for s in scans),
        "cleaned_by_filters": sum(s.n_cleaned for s in scans),
        "holding_nul": sum(s.n_nul for s in scans),
        "text_bytes": sum(s.n_text_bytes for s in scans),
        "examples": examples,
        "as_read": dict(sum((Counter(s.notes) for s in scans), Counter[str]())),
        "files": selection.files(),
    }
    assert report["read"] == sum(kept.values()) + sum(left_out.values())
    assert report["read"] == sum(f["read"] for f in report["files"].values())
    if near is not None:
        report["near_duplicates"] = {
            "left_out": near.dropped[selection.name],
            "clusters_in_all_sources": near.clusters,
            "documents_in_them": near.documents,
            "buckets_not_compared_in_full": near.n_cut,
            "largest": near.examples,
        }
    if overlap is not None:
        report["overlap"] = _overlap(selection, overlap, evaluations)
    return report


def _overlap(selection: Selection, overlap: Overlap, evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Reports the overlap. share: of the documents kept; where overlap is removed, of those that would have been, exact
    duplicates included."""
    names, found = list(evaluations), Counter[str]()
    shown: list[str] = []
    n = at = 0
    for scan in selection.scans:
        for hit in scan.hits:
            if overlap.remove or selection.labels[at + hit.document] != DROP:
                n += 1
                found.update(names[i] for i in hit.evaluations)
                shown += [hit.at] if hit.at and len(shown) < EXAMPLES else []
        at += len(scan.hashes)
    of = selection.n_kept + (n if overlap.remove else 0)
    return {
        "ngram": overlap.ngram,
        "removed": overlap.remove,
        "documents": n,
        "share": n / max(1, of),
        "by_evaluation": {
            name: {
                "documents": found[name],
                "evaluation_documents": e.n_documents,
                "too_short_to_find": e.n_short,
            }
            for name, e in evaluations.items()
        },
        "examples": shown,
    }


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes a report as JSON, and the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(report, indent=1).encode())


def lines(selection: Selection, report: Mapping[str, Any]) -> list[str]:
    """Says for the log what was left out, near and overlapping documents, and the notes that are not zero."""
    name = selection.name
    counts = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in selection.counts().items())
    out = [f"{name}: {counts}"]
    notes = {"cleaned_by_filters": "cleaned by filters", "holding_nul": "hold NUL"}
    out += [f"{name}: {report[key]} documents {said}" for key, said in notes.items() if report[key]]
    out += [f"{name}: {n} {note.replace('_', ' ')}" for note, n in report["as_read"].items()]
    if near := report.get("near_duplicates"):
        cut = near["buckets_not_compared_in_full"]
        out.append(
            f"{name}: {near['left_out']} near-duplicates left out; {near['clusters_in_all_sources']} clusters of "
            f"{near['documents_in_them']} documents in all sources"
            + (f"; {cut} buckets too varied to compare every pair" if cut else "")
        )
    if overlap := report.get("overlap"):
        parts = ", ".join(
            f"{evaluation} {e['documents']} ({e['too_short_to_find']} of {e['evaluation_documents']} cannot be found)"
            for evaluation, e in overlap["by_evaluation"].items()
        )
        done = "left out" if overlap["removed"] else "kept"
        out.append(
            f"{name}: {overlap['documents']} documents ({overlap['share']:.2%}) share {overlap['ngram']} words in a "
            f"row with evaluations, {done}: {parts}"
        )
    return out
