import requests
import base64
from PIL import Image
from io import BytesIO

def encode_image(image_path):
    """Encode an image file to base64."""
    with Image.open(image_path) as img:
        buffered = BytesIO()
        img.save(buffered, format="PNG")
        return base64.b64encode(buffered.getvalue()).decode("utf-8")

# Encode your reference image
reference_image = encode_image("input_image.png")

url = "https://api.hyperbolic.xyz/v1/image/generation"
headers = {
    "Content-Type": "application/json",
    "Authorization": "Bearer YOUR_API_KEY"
}
data = {
    "model_name": "SDXL1.0-base",
    "prompt": "A watercolor painting of the same scene",
    "image": reference_image,
    "strength": 0.7,
    "height": 1024,
    "width": 1024,
    "steps": 30
}

response = requests.post(url, headers=headers, json=data)
result = response.json()

# Save the result
image_data = base64.b64decode(result["images"][0]["image"])
with open("transformed_image.png", "wb") as f:
    f.write(image_data)
