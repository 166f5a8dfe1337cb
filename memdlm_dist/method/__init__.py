"""The mathematics of MemDLM, as functions of plain tensors; independent of torchtitan, streaming and configuration."""
