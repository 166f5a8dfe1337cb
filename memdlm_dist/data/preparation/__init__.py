"""Conversion of a corpus to tokenised shards: cut into units, which any number of workers prepare independently."""

from memdlm_dist.runtime import cpu

# Worker processes import this package first, when they receive their work.
cpu.prepare()
