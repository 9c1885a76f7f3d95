"""Objectives: each owns how its examples are made and how its loss is computed."""

from lm.objectives.base import Loss, Objective, Score
from lm.objectives.causal_lm import CausalLM
from lm.objectives.denoising import Denoising
from lm.objectives.masked_lm import MaskedLM
from lm.objectives.seq2seq import Seq2Seq
from lm.objectives.span_corruption import SpanCorruption

__all__ = ["CausalLM", "Denoising", "Loss", "MaskedLM", "Objective", "Score", "Seq2Seq", "SpanCorruption"]
