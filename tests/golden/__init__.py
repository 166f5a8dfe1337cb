"""Numbers of the published implementation."""
