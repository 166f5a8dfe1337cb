"""The mathematics of MemDLM: plain tensors in, new values out. Knows no torchtitan, no streaming, no configuration."""
