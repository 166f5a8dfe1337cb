"""Functions and classes in isolation, in the test process."""
