"""From raw bytes to the documents that stay: decoding, filters, near-duplicates, overlap with evaluations."""
