"""What schemathesis has to know of this API: what a picture is, and which kind of body it sends in this run.

Its command line reads this file (SCHEMATHESIS_HOOKS).
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


def _file(kind: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, kind)
    return file.getvalue()


FILES = {f"image/{kind}": _file(kind) for kind in ("png", "jpeg", "webp")}
TEXTS = {kind: base64.b64encode(data).decode() for kind, data in FILES.items()}

schemathesis.openapi.format("byte", st.sampled_from(list(TEXTS.values())))
schemathesis.openapi.format(
    "data-url", st.sampled_from([f"data:{kind};base64,{text}" for kind, text in TEXTS.items()])
)
schemathesis.openapi.format("binary", st.sampled_from([Binary(data) for data in FILES.values()]))


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Leave JSON or forms: schemathesis 4.32 can put no files into the cases of its coverage phase."""
    kept = os.environ["SCHEMATHESIS_BODIES"]
    for path, operations in list(raw_schema["paths"].items()):
        for method, operation in list(operations.items()):
            content: dict[str, Any] = operation.get("requestBody", {}).get("content", {kept: {}})
            for kind in set(content) - {kept}:
                del content[kind]
            if not content:
                del raw_schema["paths"][path][method]
