"""Hooks for schemathesis: valid images, and the media type of bodies in this run.

Loaded by its command line (SCHEMATHESIS_HOOKS).
"""

from __future__ import annotations

import base64
import os
from io import BytesIO
from typing import Any

import schemathesis
from hypothesis import strategies as st
from PIL import Image
from schemathesis.transport.serialization import Binary


def _file(image_format: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, image_format)
    return file.getvalue()


FILES = {f"image/{name}": _file(name) for name in ("png", "jpeg", "webp")}
TEXTS = {media_type: base64.b64encode(data).decode() for media_type, data in FILES.items()}

schemathesis.openapi.format("byte", st.sampled_from(list(TEXTS.values())))
schemathesis.openapi.format(
    "data-url", st.sampled_from([f"data:{media_type};base64,{text}" for media_type, text in TEXTS.items()])
)
schemathesis.openapi.format("binary", st.sampled_from([Binary(data) for data in FILES.values()]))


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Keep only JSON or only forms: the coverage phase of schemathesis 4.32 does not support files."""
    kept = os.environ["SCHEMATHESIS_BODIES"]
    for path, operations in list(raw_schema["paths"].items()):
        for method, operation in list(operations.items()):
            content: dict[str, Any] = operation.get("requestBody", {}).get("content", {kept: {}})
            for media_type in set(content) - {kept}:
                del content[media_type]
            if not content:
                del raw_schema["paths"][path][method]
