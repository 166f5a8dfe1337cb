"""Checks against numbers of the published implementation."""
