"""The objective that a folder's model was made for, with the special ids of the folder, and the way back.

What a folder does not say is filled in so that the objective holds together: who trains the model says it in a recipe.
What ends a document and what is padding are those of its tokenizer (`lm.data.Tokenizer`), so that a corpus made with it
fits. A decoder without padding has NO_PAD: its end of text as padding would keep the ends of documents out of the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm.data import NO_PAD
from lm.errors import UserError
from lm.hf.folder import Opened
from lm.models import T5, Bart, MBart
from lm.objectives import CausalLM, Denoising, MaskedLM, Objective, Seq2Seq, SpanCorruption

SENTINELS = 100  # T5's <extra_id_0> to <extra_id_99>
T5_PIECES = 32_100  # with the sentinels; the table of the published models has 28 rows more, for its sharding
MAX_SEQ_LEN = 1024


def objective_of(opened: Opened, tokenizer: Any) -> tuple[Objective, int]:
    """The objective of the family, and the length of its rows of text. tokenizer: of the folder, None if it has none.

    UserError where the vocabulary is too small for the special ids that differ.
    """
    model, size = opened.model, opened.model.vocab_size
    seq_len = min(model.max_seq_len or MAX_SEQ_LEN, MAX_SEQ_LEN)
    known = _Known(opened, tokenizer)
    end, pad = known("eos", "sep"), known("pad")
    if model.family == "decoder":
        end = next(i for i in (end, known("bos"), 0) if i is not None)
        if tokenizer is not None and tokenizer.end_id is not None:
            pad = tokenizer.pad_id
        pad = NO_PAD if pad is None or pad == end else pad
        stated = opened.config.get("router_aux_loss_coef")
        balance = CausalLM.router_balance if stated is None else float(stated)
        return CausalLM(start_id=end, pad_id=pad, router_balance=balance), seq_len
    rising, falling = range(size), range(size - 1, -1, -1)
    newline = min(3, size - 1)  # that of our tokenizer; of another, a place to fill in
    if model.family == "encoder":
        pad_id, cls, sep, mask = known.distinct((pad, known("cls", "bos"), known("sep", "eos"), known("mask")), falling)
        return MaskedLM(
            start_id=sep if end is None or end in (pad_id, cls, mask) else end,
            pad_id=pad_id,
            cls_id=cls,
            sep_id=sep,
            mask_id=mask,
            vocab_size=size if tokenizer is None else min(size, tokenizer.vocab_size),
            newline_id=newline,
        ), seq_len
    if isinstance(model, T5):
        pad_id, start = known.distinct((pad, end), rising)
        first = known.sentinel(min(size, T5_PIECES) - 1)
        n = min(SENTINELS, first - max(pad_id, start))
        if n >= 1:
            # 15 tokens of 100 in spans of 3: a sentinel for every 20.
            objective = SpanCorruption(start_id=start, pad_id=pad_id, first_sentinel_id=first, n_sentinels=n)
            return objective, min(seq_len, 20 * n)
    elif isinstance(model, Bart | MBart):
        pad_id, start, mask = known.distinct((pad, end, known("mask")), falling)
        return Denoising(start_id=start, pad_id=pad_id, mask_id=mask, newline_id=newline), seq_len
    pad_id, start, separator = known.distinct((pad, end, newline), falling)
    decoder_start, most = known("decoder_start"), min(seq_len, 128)
    return Seq2Seq(
        start_id=start,
        pad_id=pad_id,
        separator_id=separator,
        decoder_start_id=pad_id if decoder_start is None else decoder_start,
        max_source=most,
        max_target=most,
    ), seq_len


def special_ids(objective: Objective) -> dict[str, int | None]:
    """What config.json says of the ids of a model that was trained here; one token opens and ends its texts."""
    if isinstance(objective, MaskedLM):
        ends = {"bos_token_id": objective.cls_id, "eos_token_id": objective.sep_id}
        return {"pad_token_id": objective.pad_id, **ends}
    ids: dict[str, int | None] = dict.fromkeys(("bos_token_id", "eos_token_id"), objective.start_id)
    ids["pad_token_id"] = None if objective.pad_id == NO_PAD else objective.pad_id
    if isinstance(objective, SpanCorruption | Denoising | Seq2Seq):
        # BART's classes would end the longest texts with an id of their own.
        ids |= {"decoder_start_token_id": objective.decoder_start_id, "forced_eos_token_id": objective.start_id}
    return ids


class _Known:
    """Special ids by role, as the tokenizer, config.json and generation_config.json know them, in that order."""

    def __init__(self, opened: Opened, tokenizer: Any):
        self.opened, self.tokenizer = opened, tokenizer

    def __call__(self, *roles: str) -> int | None:
        """The first of `roles` that has an id within the vocabulary."""
        ids: Mapping[str, Any] = {} if self.tokenizer is None else self.tokenizer.ids
        end = None if self.tokenizer is None else self.tokenizer.end_id
        for role in roles:
            name = f"{role}_token_id"
            own = ids.get(role) if role != "eos" or ids.get("sep") is not None else end
            for value in (own, self.opened.config.get(name), (self.opened.generation or {}).get(name)):
                value = value[0] if isinstance(value, list) and value else value
                if isinstance(value, int) and 0 <= value < self.opened.model.vocab_size:
                    return value
        return None

    def distinct(self, wanted: Sequence[int | None], spare: Iterable[int]) -> list[int]:
        """`wanted` with the first of `spare` that nobody has in place of None and of ids that came before."""
        out = [i if i not in wanted[:n] else None for n, i in enumerate(wanted)]
        rest = (i for i in spare if i not in out)
        filled = [next(rest, None) if i is None else i for i in out]
        ids = [i for i in filled if i is not None]
        if len(ids) < len(filled):
            raise UserError(
                f"{self.opened.folder}: vocab_size: expected {len(filled)} or more, for special ids that differ, got "
                f"{self.opened.model.vocab_size}; a run cannot train so small a vocabulary"
            )
        return ids

    def sentinel(self, default: int) -> int:
        """T5's <extra_id_0>, where the tokenizer has it."""
        ids = [] if self.tokenizer is None else self.tokenizer.encode("<extra_id_0>")
        return ids[0] if len(ids) == 1 and ids[0] < self.opened.model.vocab_size else default
