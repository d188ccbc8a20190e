curl http://localhost:8000/v1/images/generations \
  -H "Authorization: Bearer sk-hypergen-123456" \
  -H "Content-Type: application/json" \
  -d '{
    "prompt": "A futuristic cityscape at sunset, cyberpunk style, neon lights, highly detailed",
    "negative_prompt": "blurry, low quality, distorted, watermark",
    "n": 2,
    "size": "1024x768",
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
    "seed": 42,
    "response_format": "b64_json"
  }'
