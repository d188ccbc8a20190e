curl --request POST \
  --url http://localhost:8000/v1/images/generations \
  --header 'Authorization: <authorization>' \
  --header 'Content-Type: application/json' \
  --data '{
  "prompt": "<string>",
  "model": "<string>",
  "n": 123,
  "size": "<string>",
  "quality": "<string>",
  "response_format": "<string>",
  "negative_prompt": "<string>",
  "num_inference_steps": 123,
  "guidance_scale": 123,
  "seed": 123,
  "lora_path": "<string>",
  "lora_scale": 123
}'
