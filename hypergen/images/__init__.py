"""Pixels to files, and the files behind `url` results. NumPy and Pillow only."""
