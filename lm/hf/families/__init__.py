"""Families of Hugging Face models, a file each: `read`, `write` and `table`; `known` lists them."""
