"""Benchmarks: what step-level batching gains over the usual ways of serving, and what a request costs."""
