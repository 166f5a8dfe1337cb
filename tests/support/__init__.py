"""Factories, fault injection, and the warm process that forks ranks."""
