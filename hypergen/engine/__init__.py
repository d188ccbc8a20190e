"""The half that draws: engine processes, and the torch-free pool that feeds and watches them."""
