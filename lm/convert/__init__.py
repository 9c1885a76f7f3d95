"""Between runs and Hugging Face folders: `folders` goes both ways, `objective` says what an imported run trains
with."""

from lm.convert.folders import Imported, config_for, export_hf, import_hf

__all__ = ["Imported", "config_for", "export_hf", "import_hf"]
