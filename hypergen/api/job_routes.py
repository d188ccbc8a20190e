"""The routes of asynchronous jobs, which take the body of any image route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from hypergen.api import openapi
from hypergen.api.dialects.endpoints import EDITS, ENDPOINTS, VARIATIONS
from hypergen.api.errors import json_response, to_json
from hypergen.api.idempotency import IdempotentRequests, idempotency_key
from hypergen.api.image_requests import read_body, require_model, validate_request
from hypergen.api.image_urls import url_base
from hypergen.api.job_store import JobStore
from hypergen.api.multipart_form import is_form
from hypergen.api.responses import Answer, chunked_json_response
from hypergen.config import Settings
from hypergen.engine_protocol import ImageGenerator

PATH = "/v1/images/jobs"


def add_job_routes(
    router: APIRouter,
    settings: Settings,
    generator: ImageGenerator,
    jobs: JobStore,
    idempotent: IdempotentRequests,
) -> None:
    """POST creates a job, GET returns its status and result, DELETE cancels it."""

    contents = [endpoint.openapi["requestBody"]["content"] for endpoint in ENDPOINTS]
    bodies = [content["application/json"]["schema"] for content in contents]
    # Edits and variations have the same form, but variations require fewer fields.
    form = VARIATIONS.openapi["requestBody"]["content"]["multipart/form-data"]

    @router.post(PATH, openapi_extra=openapi.create_job(bodies, form), status_code=202)
    async def create_job(request: Request) -> Response:
        require_model(generator)
        key = idempotency_key(request)
        body = await read_body(request, EDITS, settings)
        sent_as_form = is_form(request)
        endpoint = next(endpoint for endpoint in ENDPOINTS if endpoint.claims(body, sent_as_form))

        async def work(wait_for_disconnect: Callable[[], Awaitable[object]]) -> Answer:
            validated = await validate_request(
                request, endpoint, body, generator, settings, wait_for_disconnect
            )
            validated.reject_stream()
            url_base(request, settings, validated)  # rejects a `url` that the result could not have
            job = await jobs.submit(endpoint, validated, request.state.record, request.state.deadline)
            headers = {
                "Location": f"{settings.server.root_path}{PATH}/{job.id}",
                **validated.response_headers,
            }
            request_id, model = request.state.request_id, validated.generation.model
            return Answer(202, headers, [to_json(job.body())], model, request_id)

        answer = await idempotent.answer(request, key, PATH, body, work)
        return answer.to_response(request.state.outgoing)

    @router.get(
        PATH + "/{job_id}", openapi_extra=openapi.job("Get the status and result of a job", "getImageJob")
    )
    async def get_job(request: Request, job_id: str) -> Response:
        job = await jobs.get(job_id)
        if job.state != "succeeded":
            return json_response(job.body())
        result = await jobs.result(job, url_base(request, settings, job.validated))
        return chunked_json_response(
            [to_json(job.body())[:-1] + b',"result":', *result, b"}"], request.state.outgoing
        )

    @router.delete(PATH + "/{job_id}", openapi_extra=openapi.job("Cancel a job", "cancelImageJob"))
    async def cancel_job(job_id: str) -> Response:
        return json_response((await jobs.cancel(job_id)).body())
