"""HyperGen serves open diffusion models behind the image APIs that applications already speak."""

__version__ = "0.2.0"
