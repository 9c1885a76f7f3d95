import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.codec import decode, encode
from lm.data import C4, Filter, Gopher, GopherRepetition, Length, Without

GOOD = (
    "The quick brown fox jumps over the lazy dog, and that was to be expected of it. Nobody thought of stopping "
    "the animal with a fence. What else could have been done? Many people came to see the place where it all began, "
    "and went home again with stories about seven foxes, eleven dogs, one broken gate."
)


def reason(f: Filter, text: str) -> str | None:
    return f.apply(text).reason


def test_length_keeps_both_ends():
    f = Length(min_chars=3, max_chars=5)
    assert [reason(f, "é" * n) for n in (2, 3, 5, 6)] == ["length.short", None, None, "length.long"]
    assert reason(Length(), "") is None


def test_without_drops_documents_that_hold_a_text():
    assert [reason(Without(), t) for t in ("a\0b", "ab")] == ["without", None]
    assert [reason(Without(texts=("x", "yz")), t) for t in ("ax", "y z", "ayz")] == ["without", None, "without"]


LINE = "This line has just five words."  # six


def test_c4_keeps_lines_by_their_end_and_their_words():
    kept = [
        "One two three four five.",
        "One two three four five?",
        "One two three four five!",
        'He said "two three four five"',
        "一 二 三 四 五。",
    ]
    gone = [
        "One two three four.",
        "One two three four five",
        "One two three four five...",
        "Please enable Javascript in your browser now.",
        "Read the Privacy Policy before you go on.",
        "This site uses cookies to know you better.",
    ]
    lines = [line for pair in zip(kept, gone) for line in pair] + gone[5:]
    assert C4().apply("\n".join(lines)).text == "\n".join(kept)
    loose = C4(min_words_per_line=4, terminal=(".",), min_sentences=2).apply("\n".join(lines))
    assert loose.text == "One two three four five.\nOne two three four."


def test_c4_takes_citation_marks_out():
    text = "A fact stands here now.[12] It is a known one [citation needed] to all.\nThis is the third of three.[edit]"
    expected = "A fact stands here now. It is a known one  to all.\nThis is the third of three."
    assert C4().apply(text) == (expected, None)


@pytest.mark.parametrize("n", [2, 3])
def test_c4_counts_sentences(n):
    assert (reason(C4(), "\n".join([LINE] * n)) is None) == (n == 3)
    assert (reason(C4(), " ".join([LINE] * n)) is None) == (n == 3)
    assert (reason(C4(), "这 是 一 个 句 子。" * n) is None) == (n == 3)
    assert reason(C4(), "It is 3.14 and e.g. v1.2.3 in one.") == "c4.sentences"


def test_c4_drops_documents():
    text = "\n".join([LINE] * 3)
    assert reason(C4(), text) is None
    assert reason(C4(), f"{text}\nfunction() {{") == "c4.curly_bracket"
    assert reason(C4(), f"{text}\nLorem Ipsum") == "c4.lorem_ipsum"


def test_c4_bad_words_are_whole_words_but_in_scripts_without_spaces(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_text("darn\nTwo Words\n\n悪い\n", encoding="utf-8")
    f = C4(bad_words=str(path))
    for added, bad in (
        ("Darn!", True),
        ("darning", False),
        ("two words", True),
        ("とても悪いです", True),
        ("x", False),
    ):
        assert (reason(f, "\n".join([LINE] * 3 + [added])) == "c4.bad_word") == bad, added
    with pytest.raises(ValueError, match="bad_words: expected a file with a word a line, got nothing at"):
        C4(bad_words=f"{tmp_path}/none").apply(LINE)
    path.write_bytes("\ufeffdarn\n".encode())
    assert reason(C4(bad_words=str(path.rename(tmp_path / "marked.txt"))), "\n".join([LINE] * 3 + ["darn"]))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="bad_words: expected UTF-8, got .* in .*latin; convert it"):
        C4(bad_words=f"{tmp_path}/latin").apply(LINE)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="bad_words: expected a word a line, got none in"):
        C4(bad_words=f"{tmp_path}/empty").apply(LINE)


def english(n: int) -> list[str]:
    """n words of mean length 4, two of them stop words."""
    return (["the", "and"] + ["five5", "three", "four", "tree"] * n)[:n]


def test_gopher_keeps_ordinary_text():
    assert reason(Gopher(), GOOD) is None and reason(GopherRepetition(), GOOD) is None


def test_gopher_rules_at_their_thresholds():
    f = Gopher()
    assert reason(f, " ".join(english(50))) is None
    assert reason(f, " ".join(english(49))) == "gopher.words"
    assert reason(f, "") == reason(Gopher(min_words=0), " \n") == "gopher.words"
    assert reason(Gopher(max_words=60), " ".join(english(60))) is None
    assert reason(Gopher(max_words=60), " ".join(english(61))) == "gopher.words"

    def of_mean(tenths):  # 100 words
        total = tenths * 10 - 6
        sizes = [total // 98 + (i < total % 98) for i in range(98)]
        return " ".join(["the", "and", *("a" * n for n in sizes)])

    assert [reason(f, of_mean(t)) for t in (29, 30, 100, 101)] == ["gopher.word_length", None, None] + [
        "gopher.word_length"
    ]
    words = english(100)
    assert reason(f, " ".join(words) + "#" * 10) is None
    assert reason(f, " ".join(words) + "#" * 11) == "gopher.symbols"
    assert reason(f, " ".join(w + "..." * (i < 10) for i, w in enumerate(words))) is None
    assert reason(f, " ".join(w + "…" * (i < 11) for i, w in enumerate(words))) == "gopher.symbols"

    def lines(mark, n, before):
        rows = [" ".join(english(20)) for _ in range(10)]
        return "\n".join((mark + r if before else r + mark) if i < n else r for i, r in enumerate(rows))

    assert reason(f, lines("- ", 9, True)) is None
    assert reason(f, lines("• ", 10, True)) == "gopher.bullets"
    assert reason(f, lines("...", 3, False)) is None
    assert reason(f, lines("...", 4, False)) == "gopher.ellipses"

    assert reason(f, " ".join(english(80) + ["1234"] * 20)) is None
    assert reason(f, " ".join(english(79) + ["1234"] * 21)) == "gopher.alphabetic"
    assert reason(f, " ".join(english(60) + ["слово", "λόγος"] * 20)) is None
    assert reason(f, " ".join(["The", '"and,"', *english(100)[2:]])) is None
    assert reason(f, " ".join(["the", "the", *english(100)[2:]])) == "gopher.stop_words"
    assert reason(Gopher(min_stop_words=0), " ".join(english(100)[2:])) is None


def different(n: int, seed: int = 0, size: int = 6) -> list[str]:
    rng = random.Random(seed)
    out: dict[str, None] = {}
    while len(out) < n:
        out["".join(rng.choice("abcdefghijklmnop") for _ in range(size))] = None
    return list(out)


OFF = dict(lines=1.0, line_chars=1.0, paragraphs=1.0, paragraph_chars=1.0, top=(1.0,) * 3, repeated=(1.0,) * 6)


def test_repeated_lines_and_paragraphs_at_their_thresholds():
    for gap, number, chars in (("\n", "lines", "line_chars"), ("\n\n", "paragraphs", "paragraph_chars")):
        rule = f"gopher_repetition.{number}"
        f = GopherRepetition(**OFF | {number: 0.3})
        unique = different(7)
        assert reason(f, gap.join(unique + unique[:1] * 3)) is None
        assert reason(f, gap.join(unique[:6] + unique[:1] * 4)) == rule
        f = GopherRepetition(**OFF | {chars: 0.2})
        assert reason(f, gap.join(different(8) + different(1) * 2)) is None
        assert reason(f, gap.join(different(7) + different(1) * 3)) == rule


def naive_top(words, n):
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    most = max(grams.values(), default=0)
    return 0 if most < 2 else most * max(sum(map(len, g)) for g, c in grams.items() if c == most)


def naive_repeated(words, n):
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(grams)
    covered = {j for i, g in enumerate(grams) if counts[g] > 1 for j in range(i, i + n)}
    return sum(len(words[j]) for j in covered)


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd", "eeeee"]), max_size=60), st.integers(0, 8))
def test_ngram_shares_are_those_of_a_plain_count(words, rule):
    n = rule + 2
    share = (naive_top if n < 5 else naive_repeated)(words, n) / max(1, sum(map(len, words)))
    name = "gopher_repetition." + (f"top_{n}gram" if n < 5 else f"repeated_{n}gram")
    for threshold, dropped in ((share + 1e-9, False), (share - 1e-9, True))[: 1 + (share > 0)]:
        limits = dict(OFF, top=list(OFF["top"]), repeated=list(OFF["repeated"]))
        limits["top" if n < 5 else "repeated"][rule if n < 5 else rule - 3] = threshold
        # top n-grams may overlap themselves: their share can be above 1
        limits = {k: tuple(9.0 if x == 1.0 else x for x in v) if isinstance(v, list) else v for k, v in limits.items()}
        assert (reason(GopherRepetition(**limits), " ".join(words)) == name) == dropped


def with_repeats(n: int, blocks: int) -> str:
    """200 words of 6 letters, of which `blocks` runs of n words stand there twice."""
    words = different(200 - n * blocks, seed=n)
    again = [w for i in range(blocks) for w in words[i * (n + 1) : i * (n + 1) + n] + [f"split{i}"]]
    return " ".join((words + again)[:200]) if blocks == 1 else " ".join(words[: 200 - n * blocks - blocks] + again)


def test_the_table_of_the_paper_is_the_default():
    repeats = GopherRepetition()
    assert reason(repeats, with_repeats(5, 3)) is None  # 30 of 200 words: 0.15
    assert reason(repeats, with_repeats(5, 4)) == "gopher_repetition.repeated_5gram"
    assert reason(repeats, with_repeats(10, 1)) is None  # 20 of 200: 0.10
    assert reason(repeats, with_repeats(11, 1)) == "gopher_repetition.repeated_10gram"
    assert repeats.repeated == (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    assert (repeats.top, repeats.lines, repeats.paragraphs) == ((0.20, 0.18, 0.16), 0.3, 0.3)
    assert repeats.line_chars == repeats.paragraph_chars == 0.2
    for n, most in ((2, 20), (3, 18), (4, 16)):
        times = most // n
        gram = different(n, seed=99)

        def spread(k, n=n, gram=gram):
            return [w for i, u in enumerate(different(100 - n * k, n)) for w in (gram if i < k else []) + [u]]

        off = GopherRepetition(**OFF | {"top": tuple(most / 100 if i == n else 9.0 for i in (2, 3, 4))})
        assert reason(off, " ".join(spread(times))) is None
        assert reason(off, " ".join(spread(times + 1))) == f"gopher_repetition.top_{n}gram"


@given(st.text(st.sampled_from("ab .\n#{…-?京。[1]"), max_size=80))
def test_filters_are_pure_and_cleaning_twice_is_cleaning_once(text):
    for f in (Length(min_chars=5), Without(), C4(min_sentences=0, min_words_per_line=1), Gopher(), GopherRepetition()):
        once = f.apply(text)
        assert once == f.apply(text)
        if once.reason is None:
            assert f.rewrites or once.text == text
            if not re.search(r"\[\d+\]", once.text):
                assert f.apply(once.text) == once


def test_filters_survive_the_codec_and_refuse_nonsense():
    filters = (C4(min_sentences=5), Gopher(stop_words=("der", "die")), Length(max_chars=7))
    assert decode(tuple[Filter, ...], encode(filters), "data.filters") == filters
    with pytest.raises(ValueError, match="Length: expected 0 <= min_chars <= max_chars, got 5 and 4"):
        Length(min_chars=5, max_chars=4)
    with pytest.raises(ValueError, match="Without.texts: expected some characters each"):
        Without(texts=("",))
