"""Fixtures of the published implementation, and their tests."""
