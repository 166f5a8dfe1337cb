"""Distributed training of masked diffusion language models with parametric memory (MemDLM).

Importing the package, or any part of it, patches nothing. Where there is no accelerator, a program calls
`memdlm_dist.runtime.cpu.prepare()` before it imports torchtitan or anything else of the package; the commands do.
"""
