"""Helpers of the tests: small models, fault injection, and the zygote process that forks ranks."""
