import base64

def save_image(response_json, filename="output.png"):
    """Decode and save the generated image."""
    image_data = base64.b64decode(response_json["images"][0]["image"])
    with open(filename, "wb") as f:
        f.write(image_data)
