"""Command-line tools, as users call them."""
