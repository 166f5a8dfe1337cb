"""Memory and traffic of a step before it runs, and the bench's measured steps."""
