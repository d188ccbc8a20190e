"""Cross-origin resource sharing (CORS): which web pages of other origins may use the server.

Source: https://fetch.spec.whatwg.org/#http-cors-protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Scope, Send

# Headers of responses that pages may read, in addition to those of the specification.
_EXPOSED = (
    "idempotent-replayed",
    "location",
    "openai-processing-ms",
    "retry-after",
    "server-timing",
    "x-hypergen-ignored",
    "x-hypergen-model",
    "x-hypergen-price",
    "x-hypergen-shared-forwards",
    "x-request-id",
    "x-should-retry",
)


class Cors(CORSMiddleware):
    """Starlette's CORS, for the outermost middleware to call: its own errors need the headers, too.

    Args:
        origins: allowed ones; "*" is every origin, none switches CORS off.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=_EXPOSED,
        )

    def allows(self, scope: Scope) -> bool:
        """Whether a request comes from a page of an allowed origin."""
        origins = Headers(scope=scope).getlist("origin")
        return len(origins) == 1 and self.is_allowed_origin(origins[0])

    def preflight(self, scope: Scope) -> Response | None:
        """The response to a preflight request of an allowed origin, which carries no key; None for others."""
        headers = Headers(scope=scope)
        is_preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        return self.preflight_response(headers) if is_preflight and self.allows(scope) else None

    def with_headers(self, scope: Scope, send: Send) -> Send:
        """`send`, which adds the headers to a response; they permit nothing to other origins."""
        if not self.allow_origins:
            return send
        return partial(self.send, send=send, request_headers=Headers(scope=scope))
