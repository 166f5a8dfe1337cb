"""Tests of the command-line tools, called as users call them."""
