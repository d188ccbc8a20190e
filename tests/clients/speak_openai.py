"""Checks of the image API with OpenAI's Python client, in any version; needs BASE_URL and API_KEY.

Prints the name of each check that passed. It is a script, so that each version has its own process.
"""

from __future__ import annotations

import base64
import os
import urllib.request
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
from PIL import Image

client = openai.OpenAI(
    base_url=os.environ["BASE_URL"] + "/v1", api_key=os.environ["API_KEY"], max_retries=0, timeout=120
)
QUICK: dict[str, Any] = {"num_inference_steps": 4, "seed": 5}


def decode(data: bytes) -> Image.Image:
    with Image.open(BytesIO(data)) as image:
        image.load()
        return image


def files_of(result: Any) -> list[bytes]:
    return [base64.b64decode(item.b64_json) for item in result.data]


def png(mode: str, colour: Any, size: tuple[int, int] = (128, 128)) -> bytes:
    file = BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def check_models() -> None:
    (model,) = client.models.list()
    assert (model.object, model.owned_by) == ("model", "hypergen")
    assert client.models.retrieve(model.id).id == model.id


def check_generations_as_base64() -> None:
    result = client.images.generate(
        model="gpt-image-1",
        prompt="a red circle",
        n=2,
        size="64x128",  # pyright: ignore[reportArgumentType]  OpenAI has fewer sizes
        quality="high",
        output_format="jpeg",
        output_compression=60,
        background="opaque",
        moderation="low",
        response_format="b64_json",
        user="somebody",
        extra_body=QUICK,
    )
    assert [decode(data).format for data in files_of(result)] == ["JPEG", "JPEG"]
    assert decode(files_of(result)[0]).size == (64, 128)
    assert [item.url for item in result.data or []] == [None, None]
    assert (result.size, result.quality, result.output_format) == ("64x128", "high", "jpeg")
    assert result.usage is not None
    assert result.usage.total_tokens == result.usage.input_tokens + result.usage.output_tokens
    assert [getattr(item, "seed") for item in result.data or []] == [5, 6]  # noqa: B009  not in their types


def check_generations_as_url() -> None:
    result = client.images.generate(prompt="a red circle", response_format="url", extra_body=QUICK)
    assert result.data
    item = result.data[0]
    assert item.b64_json is None
    assert item.url
    with urllib.request.urlopen(item.url) as response:
        from_url = response.read()
    both = client.images.generate(prompt="a red circle", extra_body=QUICK)
    assert both.data
    assert both.data[0].url
    assert files_of(both) == [from_url]


def check_edits(folder: Path) -> None:
    input_image, mask = png("RGB", "red"), Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (32, 32, 96, 96))
    mask_file = folder / "mask.png"
    mask.save(mask_file)
    inputs: list[Any] = [
        input_image,
        ("a.png", input_image, "image/png"),
        [input_image],
        BytesIO(input_image),
    ]
    edited = [
        client.images.edit(
            image=image, mask=mask_file, prompt="a blue square", response_format="b64_json", extra_body=QUICK
        )
        for image in inputs
    ]
    assert len({files_of(result)[0] for result in edited}) == 1
    edited_image = decode(files_of(edited[0])[0])
    assert [edited_image.getpixel(position) for position in ((2, 2), (125, 60))] == [(255, 0, 0)] * 2
    assert edited_image.getpixel((64, 64)) != (255, 0, 0)
    several = client.images.edit(
        image=[input_image, input_image], prompt="a blue square", input_fidelity="high", n=2, extra_body=QUICK
    )
    assert len(several.data or []) == 2


def check_variations() -> None:
    result = client.images.create_variation(
        image=png("RGB", "red"), n=2, response_format="b64_json", extra_body=QUICK
    )
    assert [decode(data).size for data in files_of(result)] == [(128, 128)] * 2


def check_streams() -> None:
    fields: dict[str, Any] = {"prompt": "a red circle", "extra_body": {**QUICK, "num_inference_steps": 8}}
    whole = files_of(client.images.generate(response_format="b64_json", **fields))[0]
    events = list(client.images.generate(stream=True, partial_images=2, **fields))
    types = [event.type for event in events]
    assert types == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # pyright: ignore
    assert base64.b64decode(events[-1].b64_json) == whole
    assert decode(base64.b64decode(events[0].b64_json)).size == (128, 128)
    edit = client.images.edit(
        image=png("RGB", "red"),
        prompt="a",
        stream=True,
        partial_images=1,
        extra_body={**QUICK, "strength": 1},
    )
    assert [event.type for event in edit] == ["image_edit.partial_image", "image_edit.completed"]


def check_errors() -> None:
    def error_of(error_class: type[openai.APIStatusError], call: Any) -> openai.APIStatusError:
        try:
            call()
        except error_class as error:
            return error
        raise AssertionError(f"{error_class} was not raised")

    error = error_of(openai.BadRequestError, lambda: client.images.generate(prompt="a", n=99))
    assert (error.status_code, error.param, error.type) == (400, "n", "invalid_request_error")
    assert error.code
    assert "10" in error.message
    error_of(openai.BadRequestError, lambda: client.images.generate(prompt="a", n=99, stream=True))
    error_of(openai.BadRequestError, lambda: client.images.edit(image=b"not an image", prompt="a"))
    error = error_of(openai.NotFoundError, lambda: client.models.retrieve("owner/unknown"))
    assert error.code == "model_not_found"
    client_with_wrong_key = client.with_options(api_key="sk-wrong")
    error = error_of(openai.AuthenticationError, lambda: client_with_wrong_key.images.generate(prompt="a"))
    assert (error.code, error.status_code) == ("invalid_api_key", 401)
    assert error.request_id


def check_raw_responses() -> None:
    raw = client.images.with_raw_response.generate(prompt="a", extra_body=QUICK)
    assert int(raw.headers["openai-processing-ms"]) > 0
    assert raw.headers["x-request-id"]
    assert raw.parse().data


print(openai.__version__)
for check in (
    check_models,
    check_generations_as_base64,
    check_generations_as_url,
    check_variations,
    check_streams,
    check_errors,
    check_raw_responses,
):
    check()
    print(check.__name__)
check_edits(Path.cwd())
print(check_edits.__name__)
client.close()
