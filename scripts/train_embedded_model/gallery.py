"""Generate the images of docs/embedded-model.md: python -m scripts.train_embedded_model.gallery."""

from pathlib import Path

import click
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from .looks import LOOKS
from .lora_score import load_loras
from .pipeline import generate
from .progress import image_grid

COLUMNS = 8
PROMPTS = (
    "a red circle on a blue background",
    "a green square on a white background",
    "an orange triangle on a purple background",
    "a yellow star on a black background",
    "a cyan diamond on a brown background",
    "a pink heart on a gray background",
    "a white cross on a red background",
    "a purple ring on a yellow background",
    "a brown hexagon on a cyan background",
    "a gray moon on a pink background",
    "a black star on an orange background",
    "a blue heart on a green background",
    "a white circle on a black background",
    "a red cross on a cyan background",
    "an orange moon on a blue background",
    "a green ring on a white background",
    "two cyan triangles on a pink background",
    "two brown squares on a yellow background",
    "two white hearts on a green background",
    "three yellow stars on a black background",
    "three purple diamonds on a white background",
    "three red rings on a gray background",
    "four white rings on a brown background",
    "four blue crosses on an orange background",
    "a green square to the left of a white heart on a purple background",
    "a blue moon to the right of a red cross on a gray background",
    "an orange hexagon above a pink star on a blue background",
    "a black triangle below a yellow ring on a red background",
    "a cyan circle and a brown diamond on a white background",
    "a small red heart on a yellow background",
    "a large green star on a purple background",
    "a small white moon in the top right corner on a black background",
    "an orange circle on the left on a blue background",
    "a large striped pink moon on a gray background",
    "an outlined white hexagon on a red background",
    "a dotted yellow square on a green background",
    "a gradient blue circle on an orange background",
    "a checkered purple diamond on a cyan background",
    "a photo of a pink ring on a brown background, high quality",
    "A GREEN TRIANGLE ON A YELLOW BACKGROUND",
)
FEW = (
    "a red circle on a blue background",
    "a gray star on a cyan background",
    "three yellow stars on a black background",
    "a green square to the left of a white heart on a purple background",
)
LORA_PROMPTS: tuple[str, ...] = (
    "a red circle on a blue background",
    "a yellow star on a purple background",
    "a green heart on a white background",
    "a white moon on a black background",
    "an orange hexagon on a cyan background",
    "two pink squares on a brown background",
    "three blue diamonds on a yellow background",
    "a black cross to the left of a red ring on a gray background",
)
STEPS = (1, 2, 4, 8, 20, 50)
GUIDANCE_SCALES = (1.0, 2.0, 3.0, 4.0, 7.0, 12.0)
SEEDS = 8
SCALES = (0.0, 0.5, 1.0)
MIX = ("Pixel_Art", "Logo")


@click.command()
@click.option("--model", type=Path, default=Path("hypergen/embedded"), show_default=True)
@click.option("--output", type=Path, default=Path("docs/embedded-model"), show_default=True)
def main(model: Path, output: Path) -> None:
    """Generate the image grids; the seed of an image is its index in the grid."""
    output.mkdir(parents=True, exist_ok=True)
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)

    def save(images: list[Tensor] | Tensor, columns: int, name: str) -> None:
        batch = images if isinstance(images, Tensor) else torch.cat(images)
        image_grid(batch, columns).save(output / f"{name}.webp", quality=85, method=6)

    for side in (256, 128):
        save(generate(pipeline, list(PROMPTS), side, side), COLUMNS, f"prompts-{side}")
    # Columns are the settings; each row has one prompt and one seed.
    for guidance_scale in (2.0, 4.0):
        columns = [
            generate(pipeline, list(FEW), 128, 128, num_inference_steps=steps, guidance_scale=guidance_scale)
            for steps in STEPS
        ]
        save(side_by_side(columns), len(columns), f"steps-guidance-{guidance_scale:g}")
    columns = [generate(pipeline, list(FEW), 128, 128, guidance_scale=scale) for scale in GUIDANCE_SCALES]
    save(side_by_side(columns), len(columns), "guidance")
    save([generate(pipeline, [prompt] * SEEDS, 128, 128) for prompt in FEW], SEEDS, "seeds")
    load_loras(pipeline, model / "loras")
    prompts = list(LORA_PROMPTS)
    for name in LOOKS:
        rows = []
        for scale in SCALES:
            pipeline.set_adapters([name], [scale])
            rows.append(generate(pipeline, prompts, 256, 256))
        save(rows, len(prompts), name)
    pipeline.set_adapters(list(MIX), [1.0, 1.0])
    save(generate(pipeline, prompts, 256, 256), len(prompts), "mix")


def side_by_side(columns: list[Tensor]) -> Tensor:
    """Columns of images as one batch in row-major order."""
    return torch.stack(columns, dim=1).flatten(0, 1)


if __name__ == "__main__":
    main()
