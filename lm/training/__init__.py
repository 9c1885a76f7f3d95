"""Training: `setup` builds the step, `loop` drives it, `metrics` shows it."""
