"""Validation of a value against a JSON schema; only the keywords that HyperGen's schemas use."""

from __future__ import annotations

from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
KEYWORDS = {
    "type",
    "properties",
    "required",
    "items",
    "enum",
    "const",
    "minimum",
    "maximum",
    "anyOf",
    "description",
    "default",
    "example",
    "examples",
    "title",
    "format",
    "additionalProperties",
    "minItems",
    "maxItems",
}


def validate(value: Any, schema: dict[str, Any], at: str = "$") -> None:
    """Raise an AssertionError at the first mismatch, with its JSON path."""
    assert set(schema) <= KEYWORDS, f"{at}: unsupported keywords {set(schema) - KEYWORDS}"
    if "anyOf" in schema:
        assert any(_is_valid(value, option) for option in schema["anyOf"]), f"{at}: {value!r}"
    if "type" in schema:
        is_boolean = isinstance(value, bool)
        assert isinstance(value, TYPES[schema["type"]]), f"{at}: {value!r} must be {schema['type']}"
        assert is_boolean == (schema["type"] == "boolean"), f"{at}: {value!r} must be {schema['type']}"
    if "enum" in schema:
        assert value in schema["enum"], f"{at}: {value!r}"
    if "const" in schema:
        assert value == schema["const"], f"{at}: {value!r}"
    if "minimum" in schema:
        assert value >= schema["minimum"], f"{at}: {value!r}"
    if "maximum" in schema:
        assert value <= schema["maximum"], f"{at}: {value!r}"
    if isinstance(value, dict):
        for name in schema.get("required", []):
            assert name in value, f"{at}: {name} is missing"
        for name, inner in schema.get("properties", {}).items():
            if name in value:
                validate(value[name], inner, f"{at}.{name}")
    if isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)), at
        for position, item in enumerate(value):
            validate(item, schema.get("items", {}), f"{at}[{position}]")


def _is_valid(value: Any, schema: dict[str, Any]) -> bool:
    try:
        validate(value, schema)
    except AssertionError:
        return False
    return True
