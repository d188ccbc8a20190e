"""Commands about image files: hypergen generate | show."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from hypergen.cli.grouped_help import GenerateCommand
from hypergen.cli.setting_options import CONFIG, setting_options
from hypergen.errors import ConfigurationError, RequestError
from hypergen.load_settings import load_named_settings

_print = partial(click.echo, err=True)

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
# Settings that apply without a server.
_LOCAL_SETTINGS = (
    "device",
    "dtype",
    "embedding",
    "image_metadata",
    "lora_dir",
    "prompt_weighting",
    "single_file_config",
)


@click.command(cls=GenerateCommand)
@click.argument("prompt", required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="file to write; its extension selects png, jpeg or webp; several images are numbered",
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="image file of HyperGen, whose model and settings apply where none are given",
)
@click.option(
    "-m",
    "--model",
    help="hub id, folder, model-store tag or served-model file  [default: the embedded model]",
)
@click.option("-n", type=int, help="number of images, 1 to 10  [default: 1]")
@click.option("--negative-prompt", help="what the image should not show")
@click.option("--size", help="WIDTHxHEIGHT in pixels, multiples of 8  [default: the model's]")
@click.option(
    "--steps", "num_inference_steps", type=int, help="denoising steps, 1 to 150  [default: the model's]"
)
@click.option("--guidance-scale", type=float, help="1 to 20, 1 is no guidance  [default: the model's]")
@click.option("--seed", type=int, help="the same seed gives the same bytes  [default: random]")
@click.option("--sampler", help="name of a sampler  [default: the model's]")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="NAME[:WEIGHT]",
    help="a LoRA by name or file, and its weight from 0 to 2, by default 1; may be given several times",
)
@CONFIG
@setting_options(*_LOCAL_SETTINGS)
def generate(
    prompt: str | None,
    output: Path,
    source: Path | None,
    config: Path | None,
    loras: tuple[str, ...],
    **options: Any,
) -> None:
    """Generate images for PROMPT, or again with the settings of a file, without a server."""
    from hypergen.cli.generate import check_request, generate_files, with_lora_files
    from hypergen.cli.start_checks import check_models
    from hypergen.resolve_models import find_models

    if prompt is None and source is None:
        raise click.UsageError("Missing argument 'PROMPT'.")
    own_model, fields = repeated_fields(source, output) if source else (None, {})
    model: str | None = options.pop("model") or own_model
    flags = {name: options.pop(name) for name in _LOCAL_SETTINGS}
    settings, names = load_named_settings(config, os.environ, {**flags, "models": (model,) if model else ()})
    if loras:
        settings, options["loras"] = with_lora_files(settings, loras)
        names = replace(names, flag_loras=frozenset(options["loras"]))
    given = {"prompt": prompt, **options}
    fields |= {name: value for name, value in given.items() if value is not None}
    try:
        with names.in_messages(settings):
            checked = check_models(settings)[0]

            def check_folder(folder: Path) -> None:
                check_request(settings, replace(checked, folder=folder), fields, output)

            check_request(settings, checked, fields, output)
            loras = fields.get("loras") or ()
            found = find_models(settings, _print, check_files=check_folder, loras=loras, check_stored=True)[0]
            check_request(settings, checked.found_in(found.path), fields, output)
        for file, seed in generate_files(settings, found, fields, output):
            _print(f"{file} (seed {seed})")
    except RequestError as error:
        raise ConfigurationError(_as_given(error, given, source)) from None


def _as_given(error: RequestError, given: Mapping[str, Any], source: Path | None) -> str:
    """The message of an error about a field, with what gave the field: an option, or the file of --from."""
    if error.param is None:
        return error.message
    if (value := given.get(error.param)) is None:
        return error.message if source is None else f"{source}: {error.message}"
    options = {parameter.name: parameter.opts[0] for parameter in generate.params}
    option = "PROMPT" if error.param == "prompt" else options[error.param]
    field = f"'{error.param}'"
    message = error.message.replace(field, option) if field in error.message else f"{option}: {error.message}"
    return message if isinstance(value, (str, dict)) else f"{message.removesuffix('.')} (given: {value})."


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
