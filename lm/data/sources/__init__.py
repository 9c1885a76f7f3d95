"""Where raw text comes from: a kind of source a file, `base` says what a source is."""
