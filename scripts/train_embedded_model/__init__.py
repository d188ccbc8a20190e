"""Train HyperGen's embedded text-to-image model from random weights, on two CPU cores."""
