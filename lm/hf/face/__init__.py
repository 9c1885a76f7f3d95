"""The checking face: models that are called as those of transformers are."""
