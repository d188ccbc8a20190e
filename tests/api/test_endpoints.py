"""The table of endpoints: which one claims the body of a job, and the fields with input images."""

from __future__ import annotations

from typing import Any

import pytest

from hypergen.api.dialects.endpoints import (
    EDITS,
    ENDPOINTS,
    GENERATIONS,
    HYPERBOLIC,
    IMAGE_FIELDS,
    VARIATIONS,
    Endpoint,
)


@pytest.mark.parametrize(
    ("body", "is_form", "expected"),
    [
        ({"prompt": "a"}, False, GENERATIONS),
        ({}, False, GENERATIONS),
        ({"prompt": "a", "images": []}, False, EDITS),
        ({"images": []}, False, VARIATIONS),
        ({"prompt": "a", "image": [b"file"]}, True, EDITS),
        ({"image": [b"file"]}, True, VARIATIONS),
        ({"prompt": "a", "model_name": "m"}, False, HYPERBOLIC),
        ({"prompt": "a", "model_name": "m", "images": []}, False, HYPERBOLIC),
        ({"prompt": "a", "model_name": "m"}, True, EDITS),
    ],
)
def test_the_first_endpoint_that_claims_a_body_gets_it(
    body: dict[str, Any], is_form: bool, expected: Endpoint
) -> None:
    assert next(endpoint for endpoint in ENDPOINTS if endpoint.claims(body, is_form)) is expected


def test_the_image_fields_of_all_endpoints_are_known() -> None:
    assert {"image", "images", "mask", "control_image", "controlnet_image"} == IMAGE_FIELDS
