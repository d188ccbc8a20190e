"""The integration into BentoML: its batchable API, dispatcher and metrics."""
