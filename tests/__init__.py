"""Test suite: a folder for each kind, with what they share in support/, oracles/ and workers/."""
