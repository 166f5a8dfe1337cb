"""Distributed training of masked diffusion language models with parametric memory (MemDLM).

Importing the package or its modules patches nothing. On a machine without an accelerator a program must call
`memdlm_dist.runtime.cpu.prepare()` before it imports torchtitan or other modules of the package. The package's own
commands do so.
"""
