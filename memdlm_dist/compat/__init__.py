"""Seams: every private name, patch and parsed message of another project, a file for each project.

Each entry says why it is needed and with which version. `tests/unit/test_compat.py` asserts what each assumes, so that
an upgrade fails there by name instead of in a run.
"""
