"""Benchmarks: step-level batching compared to other policies, and the overhead of a request."""
