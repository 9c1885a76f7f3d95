"""Text from a trained model: sampling settings, and a generator over a key-value cache."""

from lm.generate.generator import Generator
from lm.generate.sampling import Sampling

__all__ = ["Generator", "Sampling"]
