"""Failures, signals, launch scripts and mistakes of users."""
