"""A soak of several servers that share jobs in Redis."""
