"""The gateway's routes, and what is checked of a request before it goes to an engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from broadbeam_crds.gateway_config import GatewayConfig
from broadbeam_router import legs
from broadbeam_router.auth import ApiKeys
from broadbeam_router.call import Call, echoed_id, id_line, trace_lines
from broadbeam_router.client import Carrier, ClientConnection
from broadbeam_router.errors import (
    SHAPES,
    Draining,
    MethodNotAllowed,
    ModelNotFound,
    NoEndpoint,
    NotFound,
    RequestError,
    TooManyRequests,
)
from broadbeam_router.fleet import Fleet
from broadbeam_router.forward import Forwarder
from broadbeam_router.incoming import Request
from broadbeam_router.metrics import CONTENT_TYPE, Metrics
from broadbeam_router.openai import Fields, chat_fields, completion_fields
from broadbeam_router.running import Ended

log = logging.getLogger(__name__)

PLAIN = b"text/plain"
CLIENT_GONE = 499  # nginx's status for it; only metrics and logs ever see it


@dataclass(frozen=True, slots=True)
class Route:
    """What goes to an engine; `fields_of` raises InvalidRequest for a body that may not."""

    name: str  # in metrics
    fields_of: Callable[[bytes], Fields]


class Gateway:
    """Serves the public port; `MetricsPage` serves the other one."""

    def __init__(self, config: GatewayConfig, fleet: Fleet, keys: ApiKeys | None, metrics: Metrics) -> None:
        self._keys = keys
        self._disaggregated = config.disaggregated
        self._max_in_flight = config.limits.max_in_flight
        self._logs_calls = log.isEnabledFor(logging.DEBUG)
        self.fleet = fleet
        self.in_flight = 0
        self.draining = False
        self.metrics = metrics
        metrics.watch(self)
        self._forwarder = Forwarder(
            fleet, self.metrics, config.timeouts, config.retries, config.route_headers
        )
        self._models = frozenset(config.models)
        self._models_body = _models_body(config.models)
        self._pages: dict[bytes, Callable[[ClientConnection, Request], None]] = {
            b"/v1/models": self._list_models,
            b"/health": self.health,
            b"/readyz": self.ready,
        }
        self._routes = {
            b"/v1/chat/completions": Route("chat", chat_fields),
            b"/v1/completions": Route("completions", completion_fields),
        }

    def check_sender(self, headers: dict[bytes, bytes]) -> None:
        """What a stranger sends need not be kept until it is whole."""
        if self._keys is not None:
            self._keys.check_headers(headers)

    def handle(self, client: ClientConnection, request: Request) -> Call | None:
        started_s = time.perf_counter()
        route = self._routes.get(request.head.path)
        try:
            if route is not None:
                return self._admit(client, request, route, started_s)
            self._page(client, request)
        except RequestError as error:
            name = "other" if route is None else route.name
            self.metrics.answered(name, SHAPES[type(error)].status, time.perf_counter() - started_s)
            headers = echoed_id(request.head)
            if isinstance(error, MethodNotAllowed):
                headers += b"Allow: GET, HEAD\r\n" if route is None else b"Allow: POST\r\n"
            client.respond_error(error, headers)
        return None

    def refused(self, error: RequestError) -> None:
        """Count what a connection refused before it became a request."""
        self.metrics.answered("none", SHAPES[type(error)].status, 0.0)

    # -- pages ----------------------------------------------------------------------------------------

    def _page(self, client: ClientConnection, request: Request) -> None:
        head = request.head
        page = self._pages.get(head.path)
        if page is None:
            raise NotFound(f"no such route: {head.path[:128].decode('latin-1')}")
        if head.method not in (b"GET", b"HEAD"):
            raise MethodNotAllowed(f"{head.path.decode()} takes GET, not {head.method.decode()}")
        page(client, request)

    def _list_models(self, client: ClientConnection, request: Request) -> None:
        if self._keys is not None:
            self._keys.check(request.head)
        client.respond(200, self._models_body)
        self.metrics.answered("models", 200, 0.0)

    def health(self, client: ClientConnection, request: Request) -> None:
        client.respond(200, b"ok\n", PLAIN)

    def ready(self, client: ClientConnection, request: Request) -> None:
        """Ready means that a request could be answered."""
        if self.draining:
            client.respond(503, b"draining\n", PLAIN)
        elif not self.fleet.decode:
            client.respond(503, b"no decode engine is ready\n", PLAIN)
        else:
            client.respond(200, b"ok\n", PLAIN)

    # -- inference ------------------------------------------------------------------------------------

    def _admit(self, client: ClientConnection, request: Request, route: Route, started_s: float) -> Call:
        head = request.head
        if head.method != b"POST":
            raise MethodNotAllowed(f"{head.path.decode()} takes POST, not {head.method.decode()}")
        if self._keys is not None:
            self._keys.check(head)
        if self.draining:
            raise Draining("the gateway is shutting down")
        if self.in_flight >= self._max_in_flight:
            limit = self._max_in_flight
            raise TooManyRequests(f"{limit} requests are in flight, which is this gateway's limit")
        line = id_line(head)
        fields = route.fields_of(request.body)
        if fields.model not in self._models:
            raise ModelNotFound(f"The model `{fields.model[:256]}` does not exist.", "model")
        if not self.fleet.decode:
            raise NoEndpoint("no decode engine is ready")
        body = legs.stripped(request.body) if fields.steers else request.body
        self.in_flight += 1  # from here on `ended` is called
        wants_prefill = self._disaggregated and bool(self.fleet.prefill) and fields.splits
        return Call(
            client=client,
            route=route.name,
            path=head.path,
            body=body,
            id_line=line,
            trace_lines=trace_lines(head) if b"traceparent" in head.headers else b"",
            started_s=started_s,
            wants_prefill=wants_prefill,
            bare=wants_prefill and fields.bare,
        )

    def carry(self, work: Call, ended: Ended) -> Carrier:
        return self._forwarder.carry(work, ended)

    def ended(self, work: Call, error: BaseException | None) -> None:
        """Runs once for every admitted call, with what kept it from its answer."""
        self.in_flight -= 1
        if error is not None:
            work.status = _status_of(error)
        elapsed_s = time.perf_counter() - work.started_s
        self.metrics.answered(work.route, work.status, elapsed_s)
        if work.first_byte_s is not None:
            self.metrics.first_tokens[work.route].add(work.first_byte_s - work.started_s)
        if work.status < 400:
            self.metrics.paths[work.way] += 1
        if self._logs_calls:
            log.debug("%s", _log_line(work, elapsed_s))


class MetricsPage:
    """Serves the metrics port, with the probes' pages, so that these answer when the public port is full."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def check_sender(self, headers: dict[bytes, bytes]) -> None:
        raise NotFound("no page here takes a body")

    def handle(self, client: ClientConnection, request: Request) -> Call | None:
        match request.head.method, request.head.path:
            case b"GET", b"/metrics":
                client.respond(200, self._gateway.metrics.render(), CONTENT_TYPE)
            case b"GET", b"/health":
                self._gateway.health(client, request)
            case b"GET", b"/readyz":
                self._gateway.ready(client, request)
            case _:
                client.respond_error(NotFound("GET /metrics, /health or /readyz"))
        return None

    def carry(self, work: Call, ended: Ended) -> Carrier:
        raise AssertionError("every page is answered at once")

    def ended(self, work: Call, error: BaseException | None) -> None:
        raise AssertionError("every page is answered at once")


def _status_of(error: BaseException) -> int:
    if isinstance(error, RequestError):
        return SHAPES[type(error)].status
    return CLIENT_GONE if isinstance(error, asyncio.CancelledError) else 500


def _models_body(models: list[str]) -> bytes:
    created = int(time.time())
    data = [{"id": m, "object": "model", "created": created, "owned_by": "broadbeam"} for m in models]
    return msgspec.json.encode({"object": "list", "data": data})


def _log_line(call: Call, elapsed_s: float) -> str:
    line = {
        "request": call.request_id,
        "route": call.route,
        "status": call.status,
        "way": call.way,
        "prefill": call.prefill_name,
        "decode": call.decode_name,
        "ms": round(elapsed_s * 1e3, 2),
        "bytes_in": len(call.body),
    }
    return msgspec.json.encode(line).decode()
