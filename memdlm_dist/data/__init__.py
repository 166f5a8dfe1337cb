"""Preparation of tokenised shards from a corpus, and the loader that turns shards into micro-batches."""
