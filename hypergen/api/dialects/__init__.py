"""API dialects: each file translates between one client API and `GenerationRequest`."""
