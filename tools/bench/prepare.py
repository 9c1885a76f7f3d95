"""Measures what comes before training: encoding, against the sentencepiece library itself, and `lm prepare` end to end.

    python tools/bench/prepare.py [--text GLOB | --jsonl GLOB --field NAME] [--json FILE]

Without a text: the sources of Python's standard library. Encoding: the same documents on one core, in batches as
`prepare` makes them, ours and the library in turns; the ratio is a median over rounds, 1.0 where ours is as fast. End
to end: from raw files on the disk to a finished store in a folder of its own, with one worker and with two, the
tokenizer learnt in that time or before it; MB are of text in UTF-8. Medians with the least and the greatest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _measure
from _measure import Clock, Spread, Time

from lm.data import Data, Jsonl, SentencePiece, Source, Stdlib, Text, prepare
from lm.data.prepare.tokenize import ENCODE_CHARS

PACKAGES = ("sentencepiece", "numpy", "tensorflow-cpu", "tensorflow")
KINDS = ("unigram", "bpe")


def documents(source: Source, cache: Path, n_bytes: float) -> Iterator[str]:
    """The first of a source, with `n_bytes` in all."""
    cache.mkdir(parents=True, exist_ok=True)
    source.fetch(cache, lambda line: None)
    for part in source.parts(cache):
        for document in source.read(part):
            yield document.raw.decode(errors="replace")
            n_bytes -= len(document.raw)
            if n_bytes <= 0:
                return


def batches(texts: list[str]) -> list[list[str]]:
    """As `prepare` hands them to its tokenizer."""
    out: list[list[str]] = [[]]
    waiting = 0
    for text in texts:
        out[-1].append(text)
        waiting += len(text)
        if waiting > ENCODE_CHARS:
            out.append([])
            waiting = 0
    return [b for b in out if b]


def measure_encoding(texts: list[str], tokenizers: dict[str, Any], rounds: int) -> dict[str, Any]:
    """tokenizers: ours by kind. -> for each, MB per CPU second of ours and of the library, and their ratio."""
    import sentencepiece

    cut, n_bytes = batches(texts), sum(len(t.encode()) for t in texts)
    calls = {}
    for kind, ours in tokenizers.items():
        library = sentencepiece.SentencePieceProcessor(model_proto=ours.to_bytes())
        calls[kind, "lm"] = ours.encode_batch
        calls[kind, "sentencepiece"] = lambda batch, library=library: library.encode(batch, num_threads=1)
        both = [[ids for batch in cut for ids in calls[kind, who](batch)] for who in ("lm", "sentencepiece")]
        same = sum(a == b for a, b in zip(*both, strict=True))
        print(
            f"{kind}: {n_bytes / sum(map(len, both[0])):.2f} bytes/token; same ids in {same} of {len(texts)} documents"
        )
    clock, rates = Clock(), {key: list[float]() for key in calls}
    for i in range(rounds):
        for key in list(calls)[:: -1 if i % 2 else 1]:
            taken = clock.time(lambda call=calls[key]: [call(batch) for batch in cut])
            rates[key].append(n_bytes / 1e6 / taken.cpu)
    return {
        kind: {
            **{who: Spread.of(rates[kind, who])._asdict() for who in ("lm", "sentencepiece")},
            "ratio": statistics.median(
                ours / library for ours, library in zip(rates[kind, "lm"], rates[kind, "sentencepiece"], strict=True)
            ),
        }
        for kind in tokenizers
    }


def measure_prepare(data: Data, model: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """data: with a tokenizer to learn. model: one that is learnt. -> for each setting, seconds and MB/s."""
    first = dataclasses.replace(data, path=str(folder / "first"))
    prepare(first, progress=False, log=lambda line: None)  # TFDS builds the default source here, once
    (name,) = data.sources
    n_bytes = json.loads((folder / "first" / name / "report.json").read_text())["text_bytes"]
    settings = {
        f"{workers} worker(s), tokenizer {when}": (workers, tokenizer)
        for when, tokenizer in (("learnt", data.tokenizer), ("given", str(model)))
        for workers in (1, 2)
    }
    times: dict[str, list[Time]] = {name: [] for name in settings}
    for i in range(rounds):
        for name, (workers, tokenizer) in list(settings.items())[:: -1 if i % 2 else 1]:
            path = folder / "again"
            if (folder / "first" / "raw").is_dir():
                shutil.copytree(folder / "first" / "raw", path / "raw")
            chosen = dataclasses.replace(data, path=str(path), tokenizer=tokenizer, workers=workers)
            times[name].append(_timed(chosen))
            shutil.rmtree(path)
    found = {
        name: {
            "s": Spread.of([t.wall for t in each])._asdict(),
            "cpu_s": Spread.of([t.cpu for t in each])._asdict(),
            "MB_per_s": Spread.of([n_bytes / 1e6 / t.wall for t in each])._asdict(),
        }
        for name, each in times.items()
    }
    for when in ("learnt", "given"):
        one, two = (times[f"{n} worker(s), tokenizer {when}"] for n in (1, 2))
        speed_up = statistics.median(a.wall / b.wall for a, b in zip(one, two, strict=True))
        found[f"2 worker(s), tokenizer {when}"]["speed_up"] = speed_up
    return {"text_MB": n_bytes / 1e6, **found}


def _timed(data: Data) -> Time:
    """Of `prepare` with its worker processes, which are over by then."""

    def cpu_s() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    cpu, wall = cpu_s(), time.perf_counter()
    prepare(data, progress=False, log=lambda line: None)
    return Time(time.perf_counter() - wall, cpu_s() - cpu)


def print_results(results: dict[str, Any]) -> None:
    print(f"\n{'encoding, MB/CPU-s':34} {'lm':>24} {'sentencepiece':>24} {'ratio':>8}")
    for kind, r in results["encoding"].items():
        ours, library = (Spread(**r[who]).text() for who in ("lm", "sentencepiece"))
        print(f"{kind:34} {ours:>24} {library:>24} {r['ratio']:8.2f}")
    found = dict(results["prepare"])
    title = f"prepare of {found.pop('text_MB'):.1f} MB"
    print(f"\n{title:34} {'s':>24} {'CPU-s':>24} {'MB/s':>24} {'speed-up':>8}")
    for name, r in found.items():
        numbers = (Spread(**r[k]).text() for k in ("s", "cpu_s", "MB_per_s"))
        speed_up = f"{r['speed_up']:.2f}" if "speed_up" in r else ""
        print(f"{name:34}", *(f"{n:>24}" for n in numbers), f"{speed_up:>8}")


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Without folders of the machine, which say nothing to others."""
    paths = {name: Path(value).name for name in ("text", "jsonl") if (value := getattr(args, name))}
    return {name: value for name, value in (vars(args) | paths).items() if name != "json"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="GLOB", help="text files, a document each (default: the standard library)")
    text.add_argument("--jsonl", metavar="GLOB", help="files of JSON lines")
    parser.add_argument("--field", default="text", help="of the JSON lines (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--train-mb", type=float, default=4.0, help="of text that a tokenizer learns from")
    parser.add_argument("--encode-mb", type=float, default=8.0, help="of text to encode a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    source: Source = Stdlib()
    if args.text:
        source = Text(glob=args.text)
    elif args.jsonl:
        source = Jsonl(glob=args.jsonl, field=args.field)
    kinds = {k: SentencePiece(kind=k, vocab_size=args.vocab_size, train_bytes=int(args.train_mb * 1e6)) for k in KINDS}
    found = _measure.machine(PACKAGES)
    print(_measure.describe(found))
    print(f"{source}; {args.vocab_size} pieces; median (least..greatest) of {args.rounds} rounds")
    folder = Path(tempfile.mkdtemp(prefix="lm-prepare-"))
    try:
        texts = list(documents(source, folder / "cache", args.encode_mb * 1e6))
        sample = list(documents(source, folder / "cache", args.train_mb * 1e6))
        tokenizers = {kind: recipe.train(sample) for kind, recipe in kinds.items()}
        results = {"encoding": measure_encoding(texts, tokenizers, args.rounds)}
        model = folder / "given.model"
        model.write_bytes(tokenizers["unigram"].to_bytes())
        data = Data(
            path=str(folder / "first"),
            sources={"text": source},
            tokenizer=kinds["unigram"],
            seq_len=1024,
            batch_size=64,
            validation_fraction=0.0,  # so that a single text will do
        )
        results["prepare"] = measure_prepare(data, model, folder, args.rounds)
        print_results(results)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found["load_at_the_end"] = round(os.getloadavg()[0], 2)
    _measure.write_json(args.json, {**found, "arguments": _arguments(args), "results": results})


if __name__ == "__main__":
    main()
