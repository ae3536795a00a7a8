"""The files the gateway reads: `gateway.json` (once, written by the operator) and, without Kubernetes,
`endpoints.json` (again whenever it changes, written by the local node)."""

from __future__ import annotations

from typing import Literal

from broadbeam_crds.conventions import GATEWAY_METRICS_PORT, GATEWAY_PORT
from broadbeam_crds.engine_config import Role, _Struct


class KubernetesEndpoints(_Struct, frozen=True, tag_field="from", tag="kubernetes"):
    """Watch the engine pods of one cluster (`conventions.LABEL_*`); a Ready pod: one endpoint per rank."""

    namespace: str
    cluster: str


class FileEndpoints(_Struct, frozen=True, tag_field="from", tag="file"):
    path: str


class AuthConfig(_Struct, frozen=True):
    """API keys come as `Authorization: Bearer KEY`; every file in `keys_dir` holds keys, one a line."""

    keys_dir: str


class LimitsConfig(_Struct, frozen=True):
    max_body_bytes: int = 32 * 2**20
    max_header_bytes: int = 64 * 2**10
    max_connections: int = 4096
    max_in_flight: int = 1024  # requests; above it 429


class TimeoutsConfig(_Struct, frozen=True):
    connect_s: float = 2.0
    prefill_s: float = 120.0
    first_byte_s: float = 300.0  # decode leg: until the response starts
    idle_s: float = 120.0  # between two bytes of a response
    drain_s: float = 30.0


class GatewayConfig(_Struct, frozen=True):
    cluster: str
    models: list[str]  # names clients may ask for
    endpoints: KubernetesEndpoints | FileEndpoints
    disaggregated: bool = False  # run the prefill leg when a prefill endpoint is ready
    policy: Literal["least-loaded", "round-robin", "random"] = "least-loaded"
    port: int = GATEWAY_PORT
    metrics_port: int = GATEWAY_METRICS_PORT
    auth: AuthConfig | None = None
    limits: LimitsConfig = LimitsConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    retries: int = 2  # further endpoints tried per leg, before the first byte reached the client
    ejection_s: float = 5.0  # an endpoint that failed is left out this long, doubling up to 60 s
    route_headers: bool = (
        False  # answer with x-broadbeam-prefill / x-broadbeam-decode (endpoint names, never hosts)
    )


class Endpoint(_Struct, frozen=True):
    """One rank. `name` is POD/RANK-IN-POD and is what logs and headers show."""

    name: str
    host: str
    port: int
    role: Role
    pool: str
    group: str
    revision: str
    ready: bool = True


class EndpointsFile(_Struct, frozen=True):
    endpoints: list[Endpoint]
