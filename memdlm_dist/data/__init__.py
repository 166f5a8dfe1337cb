"""Corpus to tokenised shards, and shards to micro-batches."""
