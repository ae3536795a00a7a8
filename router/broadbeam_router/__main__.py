"""`broadbeam-router`: flags, environment and config file, once; then serve."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import resource
import sys
from contextlib import suppress

import msgspec
import uvloop

from broadbeam_crds.conventions import ENV_POD_IP
from broadbeam_crds.engine_config import ConfigError, read
from broadbeam_crds.gateway_config import AuthConfig, FileEndpoints, GatewayConfig
from broadbeam_router.serve import Surroundings, serve
from broadbeam_router.sources import SERVICE_ACCOUNT_DIR, ApiServer

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def main(argv: list[str] | None = None) -> int:
    """Run the gateway; exit status 2 for a config or an address that cannot be used."""
    flags = _flags(argv)
    logging.basicConfig(level=flags.log_level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    try:
        config = _checked(flags.config, read(flags.config, GatewayConfig))
        if flags.endpoints is not None:
            config = msgspec.structs.replace(config, endpoints=FileEndpoints(path=flags.endpoints))
        if flags.keys_dir is not None:
            config = msgspec.structs.replace(config, auth=AuthConfig(keys_dir=flags.keys_dir))
        here = _surroundings(flags, config)
        # What is loaded by now stays; without it the collector's full passes are shorter.
        gc.freeze()
        _allow_connections()
        uvloop.run(serve(config, here))
    except ConfigError as error:
        print(f"broadbeam-router: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"broadbeam-router: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def _allow_connections() -> None:
    """As many as the system lets us have: a shell's usual 1,024 descriptors are 500 requests."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "broadbeam-router", description="The gateway in front of a cluster's engines."
    )
    parser.add_argument("--config", required=True, help="gateway.json")
    parser.add_argument(
        "--host", default=os.environ.get(ENV_POD_IP, "0.0.0.0"), help=f"address to listen on (${ENV_POD_IP})"
    )
    parser.add_argument("--port", type=int, help="instead of the config's port")
    parser.add_argument(
        "--endpoints", metavar="FILE", help="endpoints.json instead of the config's endpoints"
    )
    parser.add_argument("--keys-dir", metavar="DIR", help="ask for API keys: those in the files of DIR")
    parser.add_argument("--metrics-port", type=int, help="instead of the config's metrics_port")
    parser.add_argument(
        "--service-account", default=SERVICE_ACCOUNT_DIR, help="directory with token and ca.crt"
    )
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser.parse_args(argv)


def _surroundings(flags: argparse.Namespace, config: GatewayConfig) -> Surroundings:
    port = config.port if flags.port is None else flags.port
    metrics_port = config.metrics_port if flags.metrics_port is None else flags.metrics_port
    if isinstance(config.endpoints, FileEndpoints):
        return Surroundings(flags.host, port, metrics_port)
    host, https = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise ConfigError(
            f"{flags.config}: endpoints.from is kubernetes, but KUBERNETES_SERVICE_HOST is not set: "
            "this process does not run in a pod"
        )
    url = f"https://[{host}]:{https}" if ":" in host else f"https://{host}:{https}"
    return Surroundings(flags.host, port, metrics_port, ApiServer(url, flags.service_account))


def _checked(path: str, config: GatewayConfig) -> GatewayConfig:
    """Raises ConfigError naming the first field outside its limits."""
    if not config.models:
        raise ConfigError(f"{path}: models is empty, at least one name is needed")
    numbers = {
        "retries": (config.retries, 0),
        "ejection_s": (config.ejection_s, 0),
        "limits.max_body_bytes": (config.limits.max_body_bytes, 1),
        "limits.max_header_bytes": (config.limits.max_header_bytes, 256),
        "limits.max_connections": (config.limits.max_connections, 1),
        "limits.max_in_flight": (config.limits.max_in_flight, 1),
        "timeouts.connect_s": (config.timeouts.connect_s, 0.001),
        "timeouts.prefill_s": (config.timeouts.prefill_s, 0.001),
        "timeouts.first_byte_s": (config.timeouts.first_byte_s, 0.001),
        "timeouts.idle_s": (config.timeouts.idle_s, 0.001),
        "timeouts.drain_s": (config.timeouts.drain_s, 0),
    }
    for name, (value, least) in numbers.items():
        if value < least:
            raise ConfigError(f"{path}: {name} must be at least {least}, got {value}")
    return config


if __name__ == "__main__":
    sys.exit(main())
