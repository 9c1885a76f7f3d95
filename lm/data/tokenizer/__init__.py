"""Tokenizers: `base` says what one is, `sentencepiece` is our own, `huggingface` those of others, `implied` what the
files of a model say of one, `open` finds one."""
