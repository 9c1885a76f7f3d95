"""Tokenizers in and out of Hugging Face folders: `load_folder` reads one, `export` writes our own as one.

A folder's `tokenizer.json` is taken as it is. Where there is none, the pipeline is built from the vocabulary, for the
classes in FAMILIES, after transformers' `convert_slow_tokenizer`. Its ids are those of SentencePiece itself, also where
the classes of transformers 5 differ: mBART without its normaliser, mT5 without byte fallback, unigram LLaMA, ALBERT's
digits before a comma. Other classes need a `tokenizer.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from lm.data.tokenizer.huggingface import HFTokenizer, open_files
from lm.data.tokenizer.implied import beside, implied_class
from lm.data.tokenizer.sentencepiece import SentencePieceTokenizer
from lm.data.tokenizer.specials import SPACE, add_specials, check_ids, class_of, parse_json, read_specials
from lm.errors import UserError

SPM_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
BPE_FILES, MARIAN_FILES = ("vocab.json", "merges.txt"), ("source.spm", "target.spm", "vocab.json")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
FILES = ("tokenizer.json", *MARIAN_FILES, "merges.txt", "vocab.txt", *SPM_FILES, *SETTINGS)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's piece types
MBART_LANGUAGES = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP nl_XX "
    "ro_RO ru_RU si_LK tr_TR vi_VN zh_CN"
).split()


@dataclass(frozen=True)
class TokenizerFiles:
    """A folder's files, and its tokenizer_config.json."""

    files: Mapping[str, bytes]
    config: Mapping[str, Any]
    where: str

    def text(self, *names: str) -> str:
        """The first of the files. UserError with what is there when none is."""
        for name in names:
            if name in self.files:
                try:
                    return self.files[name].decode()
                except UnicodeDecodeError as e:
                    raise UserError(f"{self.where}/{name}: expected UTF-8, got {e}; fetch the file again") from None
        raise self.absent(names)

    def absent(self, names: tuple[str, ...]) -> UserError:
        wanted, there = " or ".join(names), ", ".join(sorted(self.files)) or "no tokenizer file"
        return UserError(
            f"{self.where}: expected {wanted} of a {class_of(self.config)}, got {there}; add the file, or the "
            "tokenizer.json that AutoTokenizer.from_pretrained(...).save_pretrained(...) writes"
        )


# From the token of a role to TemplateProcessing's templates for one text and for a pair.
Wrap = Callable[[TokenizerFiles, Callable[[str], str]], tuple[list[str], list[str]]]


@dataclass(frozen=True)
class SlowTokenizer:
    """How the tokenizer of a class is made. build: the pipeline without its special tokens. wrap: what the class puts
    around a text. extra: tokens that the vocabulary marks as special."""

    build: Callable[[TokenizerFiles], tokenizers.Tokenizer]
    wrap: Wrap
    extra: Callable[[TokenizerFiles], list[AddedToken]] = lambda source: []


def load_folder(folder: str | Path, *, literal: bool = False) -> HFTokenizer:
    """The tokenizer of a model folder in Hugging Face's layout. literal: for documents, see
    `lm.data.tokenizer.huggingface`.

    The class is tokenizer_config.json's `tokenizer_class`, else what config.json's `tokenizer_class` or `model_type`
    stands for. No token is added that only the class names, beside a tokenizer.json. UserError when files are missing
    or broken, ids have holes, or the class cannot be built exactly.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder with a tokenizer, got nothing there; fetch the model first")
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    where = str(folder)
    config = parse_json(files, "tokenizer_config.json", where)
    if not config.get("tokenizer_class"):
        config["tokenizer_class"] = implied_class(folder, whole="tokenizer.json" in files)
        files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    source = TokenizerFiles(files, config, where)
    if "tokenizer.json" not in files:
        if not files.keys() - set(SETTINGS):
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:20]) or "nothing"
            raise UserError(
                f"{folder}: expected tokenizer.json, vocab.json and merges.txt, vocab.txt or a SentencePiece .model, "
                f"got {there}; fetch the tokenizer of the model too"
            )
        if class_of(config) == "MarianTokenizer":
            if not files.keys() >= set(MARIAN_FILES):
                raise source.absent((" and ".join(MARIAN_FILES),))
        else:
            files["tokenizer.json"] = build(source).to_str(pretty=True).encode()
    return open_files(files, where, literal, beside(folder))


def from_bytes(data: bytes, name: str = "tokenizer", *, literal: bool = False) -> SentencePieceTokenizer | HFTokenizer:
    """The inverse of `to_bytes` of either kind: JSON is a HFTokenizer, a SentencePiece model our own."""
    if data[:1] == b"{":
        return HFTokenizer.from_bytes(data, name, literal)
    return SentencePieceTokenizer(data, name=name)


def build(source: TokenizerFiles) -> tokenizers.Tokenizer:
    """The pipeline of a class without tokenizer.json. UserError for one that is not in FAMILIES."""
    name = class_of(source.config)
    if name not in FAMILIES:
        raise UserError(
            f"{source.where}: expected a tokenizer.json, or one of {', '.join(sorted(FAMILIES))}, got {name} and "
            f"{', '.join(sorted(source.files))}; write it with AutoTokenizer.from_pretrained(...).save_pretrained(...) "
            "or set tokenizer_class in tokenizer_config.json"
        )
    family = FAMILIES[name]
    try:
        tokenizer = family.build(source)
    except UserError:
        raise
    except Exception as e:  # the library's own class for every mistake
        raise UserError(f"{source.where}: expected the vocabulary of a {name}, got one that is refused ({e})") from None
    specials = read_specials(source.files, source.where).within(lambda token: tokenizer.token_to_id(token) is not None)
    specials.extra.extend(family.extra(source))
    add_specials(tokenizer, specials, source.where)

    def named(role: str) -> str:
        if f"{role}_token" not in specials.named:
            raise UserError(
                f"{source.where}: expected the {role}_token of a {name} in its vocabulary, got none; name it in "
                "tokenizer_config.json"
            )
        return specials.named[f"{role}_token"].content

    single, pair = family.wrap(source, named)
    used = {piece.rpartition(":")[0] for piece in pair if not piece.startswith("$")}
    ids = [(token, tokenizer.token_to_id(token)) for token in sorted(used)]
    if unknown := [token for token, i in ids if i is None]:
        raise UserError(f"{source.where}: expected {unknown[0]!r} in the vocabulary, got no such token; check src_lang")
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return tokenizer


def _byte_level(source: TokenizerFiles) -> tokenizers.Tokenizer:
    source.text("vocab.json")
    vocab = parse_json(source.files, "vocab.json", source.where)
    merges = []
    for n, line in enumerate(source.text("merges.txt").split("\n"), 1):
        left, _, right = line.rstrip("\r").partition(" ")
        if line.startswith("#version") or not line.rstrip("\r"):
            continue
        if not left or not right or " " in right:
            raise UserError(f"{source.where}/merges.txt:{n}: expected two tokens, got {line!r}; fetch the file again")
        merges.append((left, right))
    model = models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=source.config.get("add_prefix_space", False))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _word_piece(source: TokenizerFiles) -> tokenizers.Tokenizer:
    lines = source.text("vocab.txt").removesuffix("\n").split("\n")
    vocab = {line.rstrip(): i for i, line in enumerate(lines)}
    check_ids(vocab | {f"\n{n}": len(lines) for n in range(len(lines) - len(vocab))}, f"{source.where}/vocab.txt")
    unk = read_specials(source.files, source.where).named["unk_token"].content
    config = source.config
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unk))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _proto(source: TokenizerFiles) -> Any:
    name = next((n for n in SPM_FILES if n in source.files), None)
    if name is None:
        raise source.absent(SPM_FILES)
    return _parse(source.files[name], f"{source.where}/{name}")


def _parse(model: bytes, where: str) -> Any:
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model)
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise UserError(f"{where}: expected a SentencePiece model, got {len(model)} other bytes; fetch the file again")
    return proto


def _marked(source: TokenizerFiles) -> list[AddedToken]:
    kinds = (CONTROL, USER_DEFINED)
    pieces = [p for p in _proto(source).pieces if p.type in kinds]
    return [AddedToken(p.piece, normalized=False, special=p.type == CONTROL) for p in pieces]


def _sentinels(source: TokenizerFiles) -> list[str]:
    return [f"<extra_id_{i}>" for i in reversed(range(source.config.get("extra_ids", 100)))]  # T5Tokenizer's default


def _words(
    source: TokenizerFiles, proto: Any, vocab: list[tuple[str, float]], unk: int, steps: list
) -> tokenizers.Tokenizer:
    """Unigram over words that open with a space, as T5 and all before it were trained."""
    norm = proto.normalizer_spec
    if proto.trainer_spec.model_type != 1 or not (norm.remove_extra_whitespaces and norm.add_dummy_prefix):
        raise UserError(
            f"{source.where}: expected a unigram SentencePiece model, remove_extra_whitespaces and add_dummy_prefix, "
            f"for a {class_of(source.config)}, got another; name its class as tokenizer_class in tokenizer_config.json"
        )
    fallback = proto.trainer_spec.byte_fallback
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=unk, byte_fallback=fallback))
    if norm.precompiled_charsmap:
        steps = [*steps, normalizers.Precompiled(norm.precompiled_charsmap)]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if source.config.get("add_prefix_space", True) else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme)]
    )
    metaspace = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace]) if fallback else metaspace
    return tokenizer


def _t5(source: TokenizerFiles) -> tokenizers.Tokenizer:
    proto = _proto(source)
    vocab = [(p.piece, p.score) for p in proto.pieces] + [(token, 0.0) for token in _sentinels(source)]
    return _words(source, proto, vocab, proto.trainer_spec.unk_id, [])


def _albert(source: TokenizerFiles) -> tokenizers.Tokenizer:
    """The original splits a comma from the digit before it, which a low score does for most texts."""
    proto, config = _proto(source), source.config
    comma = lambda piece: len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit()
    vocab = [(p.piece, p.score - 100 * comma(p.piece)) for p in proto.pieces]
    steps: list[Any] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not config.get("keep_accents", False):
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if config.get("do_lower_case", True):
        steps.append(normalizers.Lowercase())
    return _words(source, proto, vocab, proto.trainer_spec.unk_id, steps)


def _fairseq(languages: list[str]) -> Callable[[TokenizerFiles], tokenizers.Tokenizer]:
    """Fairseq's ids: its four specials, the pieces after SentencePiece's three, the languages, the mask."""

    def build(source: TokenizerFiles) -> tokenizers.Tokenizer:
        proto = _proto(source)
        named = read_specials(source.files, source.where).named
        first = [(named[f"{role}_token"].content, 0.0) for role in ("bos", "pad", "eos", "unk")]
        last = [(token, 0.0) for token in (*languages, named["mask_token"].content)]
        return _words(source, proto, first + [(p.piece, p.score) for p in proto.pieces[3:]] + last, 3, [])

    return build


def _llama(source: TokenizerFiles) -> tokenizers.Tokenizer:
    proto, config = _proto(source), source.config
    norm = proto.normalizer_spec
    if norm.remove_extra_whitespaces or norm.precompiled_charsmap:
        raise UserError(
            f"{source.where}: expected a SentencePiece model with identity normalisation that keeps spaces for a "
            "LlamaTokenizer, got another; name its class as tokenizer_class in tokenizer_config.json"
        )
    tokenizer = tokenizers.Tokenizer(_model(proto, lambda piece: piece))
    prefix = config.get("add_prefix_space") in (None, True)
    if config.get("legacy", False):
        steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    else:
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1)] if prefix else []))
    return tokenizer


def _model(proto: Any, spell: Callable[[str], str]) -> Any:
    """SentencePiece's model, each piece as `spell` writes it."""
    spec = proto.trainer_spec
    if spec.model_type == 1:
        vocab = [(spell(p.piece), p.score) for p in proto.pieces]
        return models.Unigram(vocab, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    ids = {spell(p.piece): i for i, p in enumerate(proto.pieces)}
    merges = _merges({spell(p.piece): p.score for p in proto.pieces if p.type == NORMAL}, ids)
    unk = spell(proto.pieces[spec.unk_id].piece)
    return models.BPE(ids, merges, unk_token=unk, fuse_unk=True, byte_fallback=spec.byte_fallback)


def _merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece joins any two neighbours that spell a piece, the best score first: each such pair is a merge."""
    ranked = []
    for piece, score in scores.items():
        splits = ((piece[:n], piece[n:]) for n in range(1, len(piece)))
        pairs = [(left, right) for left, right in splits if left in scores and right in scores]
        ranked += [((-score, ids[piece], len(left)), (left, right)) for left, right in pairs]
    return [pair for _, pair in sorted(ranked)]


def _wrap_ends(source: TokenizerFiles, token: Callable[[str], str]) -> tuple[list[str], list[str]]:
    """bos and eos as add_bos_token and add_eos_token ask; without them none, as in transformers 5."""
    bos, eos = source.config.get("add_bos_token", False), source.config.get("add_eos_token", False)

    def around(text: str, n: int) -> list[str]:
        first, last = [f"{token('bos')}:{n}"] if bos else [], [f"{token('eos')}:{n}"] if eos else []
        return [*first, f"{text}:{n}", *last]

    return around("$A", 0), around("$A", 0) + around("$B", 1)


def _wrap_bert(source: TokenizerFiles, token: Callable[[str], str]) -> tuple[list[str], list[str]]:
    single = [f"{token('cls')}:0", "$A:0", f"{token('sep')}:0"]
    return single, [*single, "$B:1", f"{token('sep')}:1"]


def _wrap_t5(source: TokenizerFiles, token: Callable[[str], str]) -> tuple[list[str], list[str]]:
    return ["$A:0", f"{token('eos')}:0"], ["$A:0", f"{token('eos')}:0", "$B:0", f"{token('eos')}:0"]


def _wrap_twice(first: str, last: str) -> Wrap:
    def wrap(source: TokenizerFiles, token: Callable[[str], str]) -> tuple[list[str], list[str]]:
        start, end = f"{token(first)}:0", f"{token(last)}:0"
        return [start, "$A:0", end], [start, "$A:0", end, end, "$B:0", end]

    return wrap


def _wrap_mbart(source: TokenizerFiles, token: Callable[[str], str]) -> tuple[list[str], list[str]]:
    end = [f"{token('eos')}:0", f"{source.config.get('src_lang') or 'en_XX'}:0"]
    return ["$A:0", *end], ["$A:0", "$B:0", *end]


def _t5_extra(source: TokenizerFiles) -> list[AddedToken]:
    return _marked(source) + [AddedToken(token, special=True) for token in _sentinels(source)]


def _mbart_extra(source: TokenizerFiles) -> list[AddedToken]:
    return _marked(source) + [AddedToken(token, special=True) for token in MBART_LANGUAGES]


FAMILIES = {
    "GPT2Tokenizer": SlowTokenizer(_byte_level, _wrap_ends),
    **dict.fromkeys(("RobertaTokenizer", "BartTokenizer"), SlowTokenizer(_byte_level, _wrap_twice("cls", "sep"))),
    **dict.fromkeys(
        ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer"), SlowTokenizer(_word_piece, _wrap_bert)
    ),
    "T5Tokenizer": SlowTokenizer(_t5, _wrap_t5, _t5_extra),
    "AlbertTokenizer": SlowTokenizer(_albert, _wrap_bert, _marked),
    "LlamaTokenizer": SlowTokenizer(_llama, _wrap_ends, _marked),
    "XLMRobertaTokenizer": SlowTokenizer(_fairseq([]), _wrap_twice("bos", "eos"), _marked),
    "MBartTokenizer": SlowTokenizer(_fairseq(MBART_LANGUAGES), _wrap_mbart, _mbart_extra),
}


def export(tokenizer: SentencePieceTokenizer, folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json: the same ids for any text in AutoTokenizer and `load_folder`.

    Pieces are written with real spaces, so that U+2581 in a text still travels as its three bytes. Text that spells a
    special token stays text, as with us: split_special_tokens. Only where two splits of a unigram model score the same
    may theirs be the other (sums in float64, not float32): once in some 300,000 tokens of Python.
    """
    proto = _parse(tokenizer.to_bytes(), "tokenizer")
    spell = lambda piece: piece.replace(SPACE, " ")
    out = tokenizers.Tokenizer(_model(proto, spell))
    if proto.trainer_spec.model_type == 1:
        # The library's unigram finds the specials and bytes in a text by their spelling; ours must not.
        literal = Regex(r"<(?=(?:0x[0-9A-F]{2}|pad|/s|unk)>)")
        out.pre_tokenizer = pre_tokenizers.Split(literal, "merged_with_previous")
    out.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    marked = [p for p in proto.pieces if p.type in (CONTROL, UNKNOWN, USER_DEFINED)]
    out.add_tokens([AddedToken(spell(p.piece), normalized=False, special=p.type != USER_DEFINED) for p in marked])
    names = zip(("pad_token", "eos_token", "unk_token"), proto.pieces[:3], strict=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {name: p.piece for name, p in names}
    config |= {"split_special_tokens": True, "clean_up_tokenization_spaces": False}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "tokenizer.json").write_text(out.to_str(pretty=True), encoding="utf-8")
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
