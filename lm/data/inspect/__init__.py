"""What is in a prepared corpus, for people."""
