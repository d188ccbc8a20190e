data = {
    "model_name": "SDXL1.0-base",
    "prompt": "a cute cat logo",
    "height": 1024,
    "width": 1024,
    "lora": {
        "Pixel_Art": 0.5,
        "Logo": 0.5,
        "Paint_Splash": 0.9
    }
}
