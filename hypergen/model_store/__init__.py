"""The files of a model: BentoML's model store, the hub, diffusers' layout and single-file checkpoints."""
