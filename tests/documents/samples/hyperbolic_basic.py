import requests
import base64

url = "https://api.hyperbolic.xyz/v1/image/generation"
headers = {
    "Content-Type": "application/json",
    "Authorization": "Bearer YOUR_API_KEY"
}
data = {
    "model_name": "FLUX.1-dev",
    "prompt": "A futuristic city skyline at sunset, cyberpunk style, neon lights",
    "height": 1024,
    "width": 1024,
    "steps": 30,
    "cfg_scale": 5
}

response = requests.post(url, headers=headers, json=data)
result = response.json()

# Decode and save the image
image_data = base64.b64decode(result["images"][0]["image"])
with open("generated_image.png", "wb") as f:
    f.write(image_data)
