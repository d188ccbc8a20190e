"""The table of dialects: every route that generates images. docs/add-a-dialect.md says how to add one."""

from __future__ import annotations

from hypergen.api.dialects.endpoint import Endpoint
from hypergen.api.dialects.hyperbolic import HYPERBOLIC
from hypergen.api.dialects.openai_edits import EDITS, VARIATIONS
from hypergen.api.dialects.openai_images import GENERATIONS

# The first that claims the body of a job gets it; generations claim what is left.
ENDPOINTS: tuple[Endpoint, ...] = (
    HYPERBOLIC,
    EDITS,
    VARIATIONS,
    GENERATIONS,
)
# Of all routes: jobs are read before it is known whose they are.
IMAGE_FIELDS = frozenset[str]().union(*(endpoint.image_fields for endpoint in ENDPOINTS))
