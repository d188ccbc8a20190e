"""HyperGen serves open diffusion models through the image APIs of OpenAI and Hyperbolic."""

__version__ = "0.2.0"
