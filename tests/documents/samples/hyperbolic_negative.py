data = {
    "model_name": "FLUX.1-dev",
    "prompt": "professional portrait photo of a woman",
    "negative_prompt": "blurry, low quality, distorted, deformed",
    "height": 1024,
    "width": 1024
}
