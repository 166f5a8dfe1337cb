"""Estimates of a step's memory, communication and time, and benchmarks of real steps."""
