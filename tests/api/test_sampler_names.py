"""The fields `sampler` and `scheduler` in both dialects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from hypergen.api.dialects import hyperbolic, openai_images
from hypergen.errors import InvalidRequestError
from tests.support.full_capability_model import FULL_MODEL_INFO, SETTINGS
from tests.support.http_client import GENERATIONS, QUICK, assert_error, generate_files

Read = Callable[..., str | None]


def _openai(**fields: Any) -> str | None:
    body = {"prompt": "a", **fields}
    return openai_images.to_request(body, FULL_MODEL_INFO, SETTINGS, "id").generation.sampler


def _hyperbolic(**fields: Any) -> str | None:
    body = {"model_name": "m", "prompt": "a", **fields}
    return hyperbolic.to_request(body, FULL_MODEL_INFO, SETTINGS, "id").generation.sampler


@pytest.mark.parametrize("read", [_openai, _hyperbolic])
@pytest.mark.parametrize(
    ("sampler", "scheduler", "expected"),
    [
        ("dpmpp_2m", None, "dpmpp_2m"),
        ("dpmpp_2m_karras", None, "dpmpp_2m_karras"),
        ("dpmpp_2m", "karras", "dpmpp_2m_karras"),
        ("dpmpp_2m_k", "karras", "dpmpp_2m_karras"),
        ("DPM++ 2M", "SGM Uniform", "dpmpp_2m_sgm_uniform"),
        ("DPM++ 2M Karras", "Automatic", "dpmpp_2m_karras"),
        ("DPM++ SDE Karras", None, "dpmpp_sde_karras"),
        ("euler_ancestral", "automatic", "euler_a"),
        (None, "Automatic", None),
    ],
)
def test_a_schedule_is_part_of_the_name_or_a_field_of_its_own(
    read: Read, sampler: str | None, scheduler: str | None, expected: str | None
) -> None:
    given = {"sampler": sampler, "scheduler": scheduler}
    assert read(**{name: value for name, value in given.items() if value is not None}) == expected


@pytest.mark.parametrize("read", [_openai, _hyperbolic])
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"sampler": "eular"}, "sampler", "available samplers: euler, dpmpp_2m"),
        ({"sampler": "eular_karras"}, "sampler", "available samplers"),
        ({"sampler": "Euler a Karras"}, "sampler", "euler_a has no schedule 'karras'; available: none"),
        ({"sampler": "euler_a", "scheduler": "karras"}, "scheduler", "no schedule 'karras'"),
        ({"sampler": "dpmpp_2m", "scheduler": "beta"}, "scheduler", "available: karras, sgm_uniform"),
        ({"sampler": "dpmpp_2m", "scheduler": "K_EULER"}, "scheduler", "no schedule 'k_euler'"),
        ({"sampler": "dpmpp_2m", "scheduler": ""}, "scheduler", "no schedule ''"),
        ({"sampler": "dpmpp_2m_karras", "scheduler": "sgm_uniform"}, "scheduler", "'karras' or absent"),
        ({"scheduler": "karras"}, "scheduler", "needs a 'sampler'"),
        ({"sampler": "euler", "scheduler": 1}, "scheduler", "should be a valid string"),
    ],
)
def test_an_impossible_combination_is_rejected_with_its_param(
    read: Read, fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        read(**fields)
    assert raised.value.param == param
    assert words in raised.value.message
    assert f"'{param}'" in raised.value.message


def test_few_steps_are_rejected_with_a_schedule_too() -> None:
    with pytest.raises(InvalidRequestError, match="at least 2 with the dpmpp_sde sampler") as raised:
        _hyperbolic(sampler="DPM++ SDE Karras", steps=1)
    assert raised.value.param == "steps"


def test_health_has_the_schedules_of_each_sampler(client: httpx.Client) -> None:
    body = client.get("/health").json()
    assert set(body["schedules"]) == set(body["samplers"])
    assert body["schedules"]["dpmpp_sde"] == ["karras", "exponential", "beta"]
    assert body["schedules"]["lcm"] == []
    assert body["models"][0]["schedules"] == body["schedules"]


def test_all_ways_to_name_a_schedule_give_the_same_file(client: httpx.Client) -> None:
    named: list[dict[str, Any]] = [
        {"sampler": "dpmpp_2m_sde_karras"},
        {"sampler": "dpmpp_2m_sde", "scheduler": "karras"},
        {"sampler": "DPM++ 2M SDE Karras"},
    ]
    files = {generate_files(client, num_inference_steps=3, seed=4, **fields)[0] for fields in named}
    assert len(files) == 1
    (file,) = files
    assert b'"sampler": "dpmpp_2m_sde_karras"' in file
    assert file != generate_files(client, num_inference_steps=3, seed=4, sampler="dpmpp_2m_sde")[0]
    response = client.post(GENERATIONS, json={**QUICK, "sampler": "Euler a", "scheduler": "Karras"})
    assert_error(response, 400, param="scheduler")
