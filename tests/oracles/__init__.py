"""Slow reference implementations that tests compare the package with."""
