"""Conversion of a corpus to tokenised shards: cut into units, which any number of workers prepare independently."""
