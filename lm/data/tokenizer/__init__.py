"""Tokenizers: `base` says what one is, `sentencepiece` is our own, `huggingface` those of others, `open` finds one."""
