"""Text from a trained model: how it is chosen, and a generator over a key-value cache."""

from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.generation.search import BeamSearch

__all__ = ["BeamSearch", "Generator", "Sampling"]
