"""Golden checks: our results against those of the published implementation."""
