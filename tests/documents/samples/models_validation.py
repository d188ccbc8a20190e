import requests

def verify_model(expected_model):
    """Verify that the expected model is loaded."""
    try:
        response = requests.get(
            "http://localhost:8000/v1/models",
            headers={"Authorization": "Bearer sk-hypergen-123456"}
        )
        models = response.json()
        loaded_model = models["data"][0]["id"]
        if loaded_model == expected_model:
            print(f"Correct model loaded: {loaded_model}")
            return True
        else:
            print(f"Wrong model! Expected: {expected_model}, Got: {loaded_model}")
            return False
    except Exception as e:
        print(f"Error checking model: {e}")
        return False

# Before running tests
verify_model("stabilityai/stable-diffusion-xl-base-1.0")
