"""Objectives: each owns how its examples are made and how its loss is computed."""

from lm.objectives.base import Loss, Objective, Score, SpecialToken
from lm.objectives.causal_lm import CausalLM
from lm.objectives.denoising import Denoising
from lm.objectives.fim import FillInTheMiddle
from lm.objectives.masked_lm import MaskedLM
from lm.objectives.prefix_lm import PrefixLM
from lm.objectives.replaced_tokens import ReplacedTokens
from lm.objectives.seq2seq import Seq2Seq
from lm.objectives.span_corruption import SpanCorruption
from lm.objectives.ul2 import UL2, Denoiser
from lm.objectives.ul2_decoder import UL2Decoder

__all__ = [
    "UL2",
    "CausalLM",
    "Denoiser",
    "Denoising",
    "FillInTheMiddle",
    "Loss",
    "MaskedLM",
    "Objective",
    "PrefixLM",
    "ReplacedTokens",
    "Score",
    "Seq2Seq",
    "SpanCorruption",
    "SpecialToken",
    "UL2Decoder",
]
