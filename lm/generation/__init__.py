"""Text from a trained model: sampling settings, and a generator over a key-value cache."""

from lm.generation.generator import Generator
from lm.generation.sampling import Sampling

__all__ = ["Generator", "Sampling"]
