"""Adapters: LoRAs by name, from their files, and applied row by row."""
