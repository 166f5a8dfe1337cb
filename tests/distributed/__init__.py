"""Layouts, resumption and recipes on several ranks over gloo."""
