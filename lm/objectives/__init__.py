"""Objectives: each owns how its examples are made and how its loss is computed."""

from lm.objectives.base import Loss, Objective, Score
from lm.objectives.causal_lm import CausalLM

__all__ = ["CausalLM", "Loss", "Objective", "Score"]
