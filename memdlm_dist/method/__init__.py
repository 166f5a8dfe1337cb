"""The mathematics of MemDLM, as functions of tensors; independent of torchtitan, streaming and configuration."""
