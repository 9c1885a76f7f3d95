"""From raw text to token stores, once: `passes` is the whole of it, by the jobs of `scan` and `tokenize`."""
