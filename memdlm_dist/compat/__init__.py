"""Private names, patches and parsed messages of other projects, one file per project.

Each entry states why it is needed, and for which version. `tests/unit/test_compat.py` asserts its assumptions, so that
an incompatible upgrade fails in a named test instead of in a run.
"""
