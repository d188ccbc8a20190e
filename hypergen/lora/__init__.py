"""LoRA: loading, batching, applying."""
