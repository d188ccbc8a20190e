"""The state of one image between two denoising steps, and the noise schedulers that advance it."""
