"""The training stream: rows of tokens as a pure function of example ids."""
