"""Distributed training of masked diffusion language models with parametric memory (MemDLM)."""

from memdlm_dist import cpu

# torchtitan decides on the device type when it is first imported, so this has to come before.
cpu.prepare()
