"""Decoding and encoding of image files, and storage of `url` results. NumPy and Pillow only."""
