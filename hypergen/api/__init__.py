"""The HTTP API. It imports no torch and no engine, only the Protocol `ImageGenerator`."""
