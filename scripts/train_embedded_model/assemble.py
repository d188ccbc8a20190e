"""Assemble the trained parts into the shipped folder: python -m scripts.train_embedded_model.assemble."""

import json
import shutil
from pathlib import Path

import click
import torch

from .pipeline import load_text_encoder, load_vae, make_pipeline
from .unet import load_unet

LARGEST_FOLDER = 13_000_000  # bytes; limit for the package, without LoRAs
LARGEST_LORA = 1_000_000  # bytes
# Keys about the machine that saving adds to configurations.
PRIVATE_KEYS = ("_name_or_path", "is_local", "local_files_only")


def assemble(folder: Path, output: Path) -> None:
    """Save the trained parts of `folder`, LoRAs too, in float16 and in diffusers' layout."""
    tokenizer, text_encoder = load_text_encoder(folder / "text")
    pipeline = make_pipeline(load_unet(folder / "unet"), load_vae(folder / "vae"), tokenizer, text_encoder)
    pipeline.to(torch.float16).save_pretrained(output)
    for name in ("vocab.json", "merges.txt"):  # transformers 5 saves tokenizer.json alone
        shutil.copy(folder / "text" / "tokenizer" / name, output / "tokenizer")
    # By default diffusers loads its components in float32, but transformers 5 follows this key.
    edit_json(output / "text_encoder" / "config.json", {"dtype": "float32"})
    for config in (output / "model_index.json", *output.glob("*/*config.json")):
        edit_json(config, {})
    loras = output / "loras"
    loras.mkdir(exist_ok=True)
    for weights in (folder / "loras").glob("*.safetensors"):
        shutil.copyfile(weights, loras / weights.name)
        assert weights.stat().st_size < LARGEST_LORA, f"{weights.name} is too large for the package."
    for weights in output.rglob("*.safetensors"):
        weights.chmod(0o644)  # safetensors writes files that only their owner can read
    files = [file for file in output.rglob("*") if file.is_file() and file.parent != loras]
    size = sum(file.stat().st_size for file in files)
    print(f"{output}: {size:,} bytes without LoRAs")
    assert size <= LARGEST_FOLDER, "The model is too large for the package."


def edit_json(path: Path, changes: dict[str, str]) -> None:
    """Change keys of a configuration, and remove those about this machine."""
    content = json.loads(path.read_text()) | changes
    content = {key: value for key, value in content.items() if key not in PRIVATE_KEYS}
    path.write_text(json.dumps(content, indent=2) + "\n")


@click.command()
@click.option(
    "--folder", type=Path, default=Path("build/embedded"), show_default=True, help="the trained parts"
)
@click.option("--output", type=Path, default=Path("hypergen/embedded"), show_default=True)
def main(folder: Path, output: Path) -> None:
    """Assemble a model from the UNet's last checkpoint, finished or not."""
    assemble(folder, output)


if __name__ == "__main__":
    main()
