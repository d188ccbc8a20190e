"""The HTTP half: no torch, no engine, only the Protocol `ImageGenerator`."""
