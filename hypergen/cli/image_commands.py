"""The settings in image files: `hypergen show FILE`, and the fields of `hypergen generate --from FILE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from hypergen.errors import ConfigurationError

# Settings that a file has as a digest of the pixels alone.
_INPUT_IMAGES = {"image": "an input image", "mask": "a mask", "control": "a control image"}
# Settings that are fields of an OpenAI request under the same name.
_FIELDS = (
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "sampler",
    "seed",
    "true_cfg_scale",
    "prompt_2",
    "negative_prompt_2",
    "clip_skip",
    "enable_refiner",
)


@click.command("show")
@click.argument("file", type=click.Path(path_type=Path))
def show_file(file: Path) -> None:
    """Print the settings in an image FILE that HyperGen wrote."""
    from hypergen.images.saved_settings import read_settings

    for name, value in read_settings(file).items():
        click.echo(f"{_printable(name) + ':':20} {_printable(value)}")


def _printable(value: Any) -> str:
    """The value on one line, as JSON unless it is plain text: a file may hold escape sequences."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def repeated_fields(file: Path, output: Path) -> tuple[str, dict[str, Any]]:
    """The model that made an image file, and the fields of the OpenAI request that makes it again.

    Args:
        output: file to write; the compression of the first one applies if it is no PNG.

    Raises:
        ConfigurationError: the file has no settings, or they are not enough.
    """
    from hypergen.images.saved_settings import read_settings

    settings = read_settings(file)
    for name, shown in _INPUT_IMAGES.items():
        if name in settings:
            raise ConfigurationError(
                f"{file} cannot be repeated: it was made with {shown}, which it does not contain."
            )
    fields = {name: settings.get(name) for name in _FIELDS}
    fields["size"] = f"{settings.get('width')}x{settings.get('height')}"
    # Without any, not even the default of the model.
    fields["loras"] = settings.get("loras", {})
    if output.suffix.lower() != ".png":
        fields["output_compression"] = settings.get("output_compression")
    return str(settings["model"]), fields
