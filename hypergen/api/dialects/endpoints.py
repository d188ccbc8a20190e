"""The table of all routes that generate images. docs/add-a-dialect.md describes how to add one."""

from __future__ import annotations

from hypergen.api.dialects.endpoint import Endpoint
from hypergen.api.dialects.hyperbolic import HYPERBOLIC
from hypergen.api.dialects.openai_edits import EDITS, VARIATIONS
from hypergen.api.dialects.openai_images import GENERATIONS

# A job belongs to the first endpoint that claims its body; GENERATIONS claims every other JSON body.
ENDPOINTS: tuple[Endpoint, ...] = (
    HYPERBOLIC,
    EDITS,
    VARIATIONS,
    GENERATIONS,
)
# Of all routes, because the body of a job is read before its route is known.
IMAGE_FIELDS = frozenset[str]().union(*(endpoint.image_fields for endpoint in ENDPOINTS))
