"""Model families: one file each, a config and the function that composes its parts from `lm.nn`."""

from lm.models.base import Model
from lm.models.gpt2 import GPT2
from lm.models.llama import Llama

__all__ = ["GPT2", "Llama", "Model"]
