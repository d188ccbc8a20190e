"""What this server's settings and its model make of the bodies in /openapi.json.

The dialects' own ranges are the documents'; a server may allow less of them, has its own samplers and LoRAs,
and what its model cannot do is null there. Rules between two fields stand in `allOf`.
"""

from __future__ import annotations

from typing import Any, cast

from hypergen.api.schemas import PICTURE
from hypergen.api.validation import CONTROL_OPTIONS, MAX_SEED, SMALLEST_SIDE, default_size
from hypergen.config import ServerSettings
from hypergen.model_info import ModelDescription, Option

Schema = dict[str, Any]

_NULL: Schema = {"type": "null"}
_EMPTY: Schema = {"type": "string", "enum": [""]}
_FILE: Schema = {"type": "string", "format": "binary"}
_BASE64: Schema = {"type": "string", "format": "byte", "examples": [PICTURE]}
_PICTURES: dict[str, Option] = {"image": "image", "control_image": "control", "controlnet_image": "control"}
_MODELS = ("control_model", "controlnet_name")
_CONTROL_PICTURES = ("control_image", "controlnet_image")
_STEPS = ("num_inference_steps", "steps")
_DOCUMENTED_SIDE, _LARGEST_SIDES = 2048, (1664, 2432)


def narrow(
    body: Schema, is_form: bool, settings: ServerSettings, description: ModelDescription | None
) -> None:
    """Change a body's schema in place; without a description, to what any model could take.

    Args:
        is_form: a form has no null, and its pictures are files.
    """
    fields: dict[str, Schema] = {name: _flat(field) for name, field in body["properties"].items()}
    required: list[str] = body.get("required", [])
    for name, rule in _ranges(settings).items():
        if name in fields:
            fields[name] |= rule
    picture = _FILE if is_form else _BASE64
    for name in _PICTURES:
        if fields.get(name, {}).get("type") == "string":
            fields[name] |= picture
    if description is not None:
        _tell_model(fields, is_form, description, settings)
    if not is_form:
        for name in set(fields) - set(required):
            _allow_null(fields[name])
    body["properties"] = fields
    body["allOf"] = _rules(fields, is_form, description, settings)
    body.pop("title", None)


def _flat(field: Schema) -> Schema:
    """A field without pydantic's null and title; of several kinds of it, the first."""
    kinds: list[Schema] = field.get("anyOf", [field])
    told = {name: value for name, value in field.items() if name != "anyOf" and value is not None}
    return {name: value for name, value in {**kinds[0], **told}.items() if name != "title"}


def _ranges(settings: ServerSettings) -> dict[str, Schema]:
    """What settings, and checks that a range cannot say, leave of a field."""
    sides = _multiples_of_8(settings.max_side)
    side = max(_LARGEST_SIDES) if settings.max_side >= _DOCUMENTED_SIDE else settings.max_side
    return {
        "prompt": {"pattern": r"\S"},
        "size": {"pattern": f"^(auto|({sides})x({sides}))$"},
        "width": {"maximum": side},
        "height": {"maximum": side},
        "num_inference_steps": {"maximum": settings.max_steps},
        "steps": {"maximum": min(100, settings.max_steps)},
        "background": {"enum": ["auto", "opaque"]},
        "loras": {"propertyNames": {"minLength": 1}},
    }


def _tell_model(
    fields: dict[str, Schema], is_form: bool, description: ModelDescription, settings: ServerSettings
) -> None:
    """The model's defaults, samplers, LoRAs and control models; null, in forms empty, where it has none."""
    not_taken = _EMPTY if is_form else _NULL
    defaults = description.defaults
    width, height = default_size(description, settings.max_side)
    told: dict[str, Schema] = {
        "size": {"examples": [f"{width}x{height}"]},
        "guidance_scale": {"default": defaults.guidance_scale},
        "num_inference_steps": {"default": min(defaults.num_inference_steps, settings.max_steps)},
        "sampler": {"enum": list(description.samplers)} if description.samplers else not_taken,
    }
    if description.loras and "loras" in description.options:
        names: Schema = {"enum": list(description.loras)}
        mixed: Schema = {"propertyNames": names, "maxProperties": description.max_loras}
        example: Schema = {"examples": [{description.loras[0]: 1.0}]}
        told |= {"lora_path": names, "loras": {**mixed, **example}, "lora": {**mixed, **example}}
    else:
        told |= {name: {"maxProperties": 0, "examples": [{}]} for name in ("loras", "lora")}
        told["lora_path"] = not_taken
    for name in _MODELS:
        told[name] = {"enum": list(description.control_models)}
    for name, option in _PICTURES.items():
        if option not in description.options and fields.get(name, {}).get("type") == "string":
            told[name] = not_taken
    if "control" not in description.options:
        told |= dict.fromkeys(_MODELS, not_taken)
        told |= {name: {"enum": [value]} for name, value in CONTROL_OPTIONS.items()}
    if "true_cfg_scale" not in description.options:
        told["true_cfg_scale"] = not_taken
    for name, rule in told.items():
        if name in fields:
            known = fields[name] if rule != not_taken else {"description": fields[name]["description"]}
            fields[name] = {**known, **rule}


def _allow_null(field: Schema) -> None:
    """Null counts as not given."""
    kind = field.get("type")
    if isinstance(kind, str) and kind != "null":
        field["type"] = [kind, "null"]
    if "enum" in field:
        field["enum"] = [*cast(list[Any], field["enum"]), None]


def _rules(
    fields: dict[str, Schema], is_form: bool, description: ModelDescription | None, settings: ServerSettings
) -> list[Schema]:
    """What one field asks of another."""
    rules: list[Schema] = []
    most: int = fields["n"]["maximum"]
    last = {"seed": {"maximum": MAX_SEED - most + 1}}
    rules.append({"if": {"properties": {"n": {"enum": [1, None]}}}, "else": {"properties": last}})
    if "output_format" in fields:
        lossy: Schema = {"properties": {"output_format": {"enum": ["jpeg", "webp"]}}}
        lossy["required"] = ["output_format"]
        whole = {"output_compression": {"enum": [100, None]}}
        rules.append({"if": lossy, "else": {"properties": whole}})
    if "lora_path" in fields and is_form:
        rules.append({"not": {"required": ["lora_path", "loras"]}})
    elif "lora_path" in fields:
        rules.append({"anyOf": [{"properties": {name: _NULL}} for name in ("lora_path", "loras")]})
    if "width" in fields and settings.max_side >= _DOCUMENTED_SIDE:
        usual = {"properties": {side: {"maximum": _DOCUMENTED_SIDE} for side in ("width", "height")}}
        rules.append({"anyOf": [usual, _of_size(*_LARGEST_SIDES), _of_size(*_LARGEST_SIDES[::-1])]})
    if picture := next((name for name in _CONTROL_PICTURES if name in fields), None):
        usual = {name: {"enum": [value, None]} for name, value in CONTROL_OPTIONS.items()}
        given = {"properties": {picture: {"type": "string"}}, "required": [picture]}
        rules.append({"if": given, "else": {"properties": usual}})
    steps = next(name for name in _STEPS if name in fields)
    for name, least in (description.samplers if description else {}).items():
        if least > 1:
            chosen = {"properties": {"sampler": {"const": name}}, "required": ["sampler"]}
            rules.append({"if": chosen, "then": {"properties": {steps: {"minimum": least}}}})
    return rules


def _of_size(width: int, height: int) -> Schema:
    properties = {"width": {"const": width}, "height": {"const": height}}
    return {"properties": properties, "required": ["width", "height"]}


def _multiples_of_8(most: int) -> str:
    """A regular expression of all sides: by their hundreds, those with the same last two digits together."""
    hundreds: dict[str, list[str]] = {}
    for hundred in range(most // 100 + 1):
        sides = range(hundred * 100, min(hundred * 100 + 99, most) + 1)
        tens = [f"{side % 100:02}" for side in sides if side % 8 == 0 and side >= SMALLEST_SIDE]
        if tens:
            hundreds.setdefault("|".join(tens), []).append(str(hundred) if hundred else "")
    return "|".join(f"({'|'.join(many)})({tens})" for tens, many in hundreds.items())
