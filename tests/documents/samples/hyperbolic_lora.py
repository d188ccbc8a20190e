import requests
import base64

url = "https://api.hyperbolic.xyz/v1/image/generation"
headers = {
    "Content-Type": "application/json",
    "Authorization": "Bearer YOUR_API_KEY"
}
data = {
    "model_name": "SDXL1.0-base",
    "prompt": "a cute cat",
    "height": 1024,
    "width": 1024,
    "lora": {"Pixel_Art": 1.0}
}

response = requests.post(url, headers=headers, json=data)
result = response.json()

image_data = base64.b64decode(result["images"][0]["image"])
with open("pixel_cat.png", "wb") as f:
    f.write(image_data)
