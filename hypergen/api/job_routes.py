"""The routes of jobs: the bodies of every other route that draws, answered later."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from hypergen.api import openapi
from hypergen.api.dialects.endpoints import EDITS, ENDPOINTS, VARIATIONS
from hypergen.api.errors import json_response, to_json
from hypergen.api.image_requests import (
    chunked_json_response,
    disconnected,
    parse_request,
    read_body,
    require_model,
    url_base,
)
from hypergen.api.jobs import Jobs
from hypergen.api.multipart_form import is_form
from hypergen.api.responses import write
from hypergen.config import Settings
from hypergen.engine_protocol import ImageGenerator

PATH = "/v1/images/jobs"


def add_job_routes(router: APIRouter, settings: Settings, generator: ImageGenerator, jobs: Jobs) -> None:
    """POST takes a job on, GET tells how it is and in the end its result, DELETE cancels it."""

    described = [endpoint.openapi["requestBody"]["content"] for endpoint in ENDPOINTS]
    bodies = [content["application/json"]["schema"] for content in described]
    # A form reads the same for edits and variations; those want fewer fields.
    form = VARIATIONS.openapi["requestBody"]["content"]["multipart/form-data"]

    @router.post(PATH, openapi_extra=openapi.create_job(bodies, form), status_code=202)
    async def create_job(request: Request) -> Response:
        require_model(generator)
        body = await read_body(request, EDITS, settings)
        sent_as_form = is_form(request)
        endpoint = next(endpoint for endpoint in ENDPOINTS if endpoint.claims(body, sent_as_form))
        description = require_model(generator, body.get(endpoint.model_field))
        deadline: float = request.state.deadline
        until_client_left = partial(disconnected, request)
        asked = await parse_request(
            endpoint, body, description, settings, request.state.request_id, until_client_left, deadline
        )
        body.clear()
        request.state.body.release()
        asked.refuse_stream()
        url_base(request, settings, asked)  # refuses what its result could not hold
        job = await jobs.submit(endpoint, asked, deadline)
        return json_response(jobs.status(job), 202, {"Location": f"{PATH}/{job.id}", **asked.headers})

    @router.get(PATH + "/{job_id}", openapi_extra=openapi.job("How a job is, and its result", "getImageJob"))
    async def get_job(request: Request, job_id: str) -> Response:
        job = jobs.get(job_id)
        told = jobs.status(job)
        if job.state != "succeeded":
            return json_response(told)
        result = await write(jobs.result, job, url_base(request, settings, job.asked))
        return chunked_json_response(
            [to_json(told)[:-1] + b',"result":', *result, b"}"], request.state.outgoing
        )

    @router.delete(PATH + "/{job_id}", openapi_extra=openapi.job("Cancel a job", "cancelImageJob"))
    async def cancel_job(job_id: str) -> Response:
        return json_response(jobs.status(await jobs.cancel(job_id)))
