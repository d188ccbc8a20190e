data = {
    "model_name": "FLUX.1-dev",
    "prompt": "a magical forest",
    "seed": 42,
    "height": 1024,
    "width": 1024
}
