"""Dialects: one file each, from a client's words to a `GenerationRequest` and back."""
