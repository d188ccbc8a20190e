"""Model info with every capability, to validate requests without a model."""

from __future__ import annotations

from hypergen.config import ServerSettings
from hypergen.model_info import ModelDefaults, ModelInfo

FULL_MODEL_INFO = ModelInfo(
    id="m",
    family="sdxl",
    defaults=ModelDefaults(num_inference_steps=50, guidance_scale=7.5, width=1024, height=1024),
    samplers={"euler": 1, "dpmpp_2m": 1, "dpmpp_sde": 2, "euler_a": 1},
    schedules={"euler": ("karras",), "dpmpp_2m": ("karras", "sgm_uniform"), "dpmpp_sde": ("karras",)},
    min_steps=1,
    device="cpu",
    dtype="float32",
    capabilities=frozenset(
        {"prompt_2", "negative_prompt", "enable_refiner", "image", "mask", "control", "loras"}
    ),
    loras=("Pixel_Art", "Logo", "Paint_Splash"),
    max_loras=4,
    controlnets=("canny", "depth"),
)
SETTINGS = ServerSettings.model_validate({})
