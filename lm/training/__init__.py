"""Training: `train` is a run from top to bottom, `start` what it begins with, `setup` builds the step, `loop` drives
it, `watch` looks at its losses, `log` shows it."""
