"""`broadbeam-operator`: the process that runs in the cluster."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Annotated

import aiohttp
import kopf
import typer
from kubernetes.aio.client.configuration import Configuration

from broadbeam_operator.cluster import SERVING_CLUSTER, Cluster, ClusterError
from broadbeam_operator.handlers import register, settings
from broadbeam_operator.images import Images
from broadbeam_operator.kubernetes_cluster import connect, credentials
from broadbeam_operator.kv_effect import HttpMeter, KVWatch
from broadbeam_operator.metrics import Snapshot, served
from broadbeam_operator.reconcile import Operator
from broadbeam_operator.version import version
from broadbeam_operator.workers import Pace, Workers

log = logging.getLogger("broadbeam_operator")

HTTP_NOT_FOUND = 404

DEFAULTS = Images()
EPILOG = """
Examples:

  broadbeam-operator run                                (all namespaces, in a pod or by the kubeconfig)

  broadbeam-operator run --namespace team-a --namespace team-b

  broadbeam-operator run --kubeconfig ./kubeconfig --log-level debug
"""


@dataclass(frozen=True, slots=True)
class Options:
    namespaces: Sequence[str] = ()  # empty: all
    kubeconfig: str | None = None
    context: str | None = None
    images: Images = field(default_factory=Images)
    health_port: int = 8081  # 0: no health endpoint
    metrics_port: int = 8082  # 0: no metrics
    log_level: str = "info"
    pace: Pace = field(default_factory=Pace)


app = typer.Typer(
    name="broadbeam-operator",
    help="Turns ServingClusters into groups of engine pods and a gateway.",
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"broadbeam-operator {version()}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog=EPILOG)
def run(
    namespace: Annotated[
        list[str] | None, typer.Option(help="Look after this namespace only; may be given again.")
    ] = None,
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", help="Look after all namespaces: the default.")
    ] = False,
    kubeconfig: Annotated[
        str | None,
        typer.Option(help="Credentials. Unset: the pod's own, or else $KUBECONFIG or ~/.kube/config."),
    ] = None,
    context: Annotated[str | None, typer.Option(help="Context of the kubeconfig.")] = None,
    health_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of GET /healthz; 0: none.")] = 8081,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of GET /metrics; 0: none.")
    ] = 8082,
    runtime_image: Annotated[
        str, typer.Option(help="Image of engines broadbeam and sim, where the spec names none.")
    ] = DEFAULTS.runtime,
    router_image: Annotated[str, typer.Option(help="Image of the gateway.")] = DEFAULTS.router,
    vllm_image: Annotated[
        str, typer.Option(help="Image of engine vllm, where the spec names none.")
    ] = DEFAULTS.vllm,
    resync: Annotated[
        float, typer.Option(min=1, help="Seconds between two looks at a cluster of which nothing is heard.")
    ] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Watch ServingClusters and make the cluster hold what they describe, until stopped.

    It needs no finalizers: what it made goes away with its ServingCluster, also while it is not running.
    """
    if all_namespaces and namespace:
        _fail("--namespace and --all-namespaces exclude each other")
    if log_level not in ("debug", "info", "warning", "error"):
        _fail(f'--log-level: "{log_level}" is not one of debug, info, warning, error')
    options = Options(
        namespaces=tuple(namespace or ()),
        kubeconfig=kubeconfig,
        context=context,
        images=Images(runtime=runtime_image, router=router_image, vllm=vllm_image),
        health_port=health_port,
        metrics_port=metrics_port,
        log_level=log_level,
        pace=Pace(resync_s=resync),
    )
    try:
        asyncio.run(serve(options))
    except ClusterError as error:
        _fail(str(error))
    except OSError as error:  # a port in use
        _fail(error.strerror or str(error))


async def serve(options: Options) -> None:
    """Until SIGTERM or SIGINT, which kopf catches."""
    configure_logging(options.log_level)
    found = await credentials(options.kubeconfig, options.context)
    async with connect(found) as cluster, aiohttp.ClientSession() as scraping, AsyncExitStack() as stack:
        operator = Operator(cluster, KVWatch(HttpMeter(scraping)), options.images)
        workers = Workers(operator, options.pace)
        stack.push_async_callback(workers.stop)
        if options.metrics_port:
            now = Snapshot(workers.states.values, lambda: workers.waiting, lambda: cluster.writes)
            workers.metrics.registry.register(now)
            await stack.enter_async_context(served(workers.metrics.registry, options.metrics_port))
        where = ", ".join(options.namespaces) or "all namespaces"
        log.info("broadbeam-operator %s looks after %s at %s", version(), where, found.host)
        await resource_served(cluster, next(iter(options.namespaces), None))
        await watch(options, workers, found)


async def watch(options: Options, workers: Workers, found: Configuration) -> None:
    registry = kopf.OperatorRegistry()
    register(registry, workers, found)
    await kopf.operator(
        registry=registry,
        settings=settings(),
        namespaces=options.namespaces,
        clusterwide=not options.namespaces,
        standalone=True,
        liveness_endpoint=f"http://0.0.0.0:{options.health_port}/healthz" if options.health_port else None,
    )


async def resource_served(cluster: Cluster, namespace: str | None) -> None:
    """Wait until the API server knows ServingClusters: kopf looks only once, when it starts."""
    told = False
    while True:
        try:
            await cluster.list(SERVING_CLUSTER, namespace)
            return
        except ClusterError as error:
            if error.status != HTTP_NOT_FOUND:
                raise
        if not told:
            log.warning("the cluster has no %s: waiting for the CRD", SERVING_CLUSTER.plural)
            told = True
        await asyncio.sleep(1)


def configure_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    if level != "debug":
        # kopf tells of every event at INFO, aiohttp of every health probe.
        logging.getLogger("kopf").setLevel(logging.WARNING)
        logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


def _fail(message: str) -> None:
    typer.echo(f"broadbeam-operator: {message}", err=True)
    raise typer.Exit(2)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
