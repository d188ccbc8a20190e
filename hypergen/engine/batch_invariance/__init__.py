"""Batch invariance: the bytes of an image do not depend on its batch."""
