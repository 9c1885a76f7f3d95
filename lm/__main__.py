"""`python -m lm`: the same as `lm`."""

from lm.cli import main

main()
