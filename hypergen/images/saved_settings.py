"""Read the settings that an image file of HyperGen has as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from PIL import ExifTags, Image

from hypergen.errors import ConfigurationError
from hypergen.images.decoding import INPUT_FORMATS
from hypergen.images.encoding import METADATA_KEY


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in an image file. Prompts in them are text from anywhere.

    Raises:
        ConfigurationError: it is no PNG, JPEG or WebP, is damaged, or has no settings. One line.
    """
    try:
        with Image.open(file, formats=INPUT_FORMATS) as image:
            text = image.info.get(METADATA_KEY) or image.getexif().get(ExifTags.Base.ImageDescription)
            image.load()
    except FileNotFoundError:
        raise ConfigurationError(f"No such file: {file}") from None
    except Exception:  # Pillow raises many types for broken files
        raise ConfigurationError(f"{file} is not a readable PNG, JPEG or WebP image.") from None
    try:
        settings = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict) or "prompt" not in settings or "model" not in settings:
        raise ConfigurationError(
            f"{file} has no settings of HyperGen; another program may have removed them."
        )
    return cast(dict[str, Any], settings)
