"""OpenAI's image streaming events: previews and finished pictures of generations and edits."""

from __future__ import annotations

import base64
from typing import Any, Literal

from hypergen.api.dialects.openai_images import ImagesRequest, usage
from hypergen.api.errors import to_json
from hypergen.events import ImageFinished, Preview

Kind = Literal["image_generation", "image_edit"]


def to_frame(kind: Kind, asked: ImagesRequest, created: int, event: Preview | ImageFinished) -> list[bytes]:
    """One event as it is sent, in pieces; takes milliseconds per megabyte."""
    request = asked.generation
    body: dict[str, Any] = {
        "created_at": created,
        "size": f"{request.width}x{request.height}",
        "quality": asked.quality,
        "background": "opaque",
        "output_format": request.output_format,
    }
    if isinstance(event, Preview):
        name = f"{kind}.partial_image"
        # OpenAI's previews belong to one picture; `index` tells of which, where several were asked for.
        body |= {"partial_image_index": event.number, "index": event.index}
    else:
        name = f"{kind}.completed"
        body |= {
            "usage": usage(request, event.prompt_tokens, asked.image_tokens, images=1),
            "seed": event.seed,
            "index": event.index,
        }
    start = f'event: {name}\ndata: {{"type":"{name}","b64_json":"'.encode()
    return [start, base64.b64encode(event.data), b'",' + to_json(body)[1:] + b"\n\n"]
