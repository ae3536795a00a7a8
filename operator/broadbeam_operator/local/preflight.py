"""What would keep a cluster from running on this machine, found before anything starts. Pure save `look`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from broadbeam_crds.capacity import Capacity, capacities
from broadbeam_crds.conventions import (
    GATEWAY_METRICS_PORT,
    KV_SIDE_CHANNEL_PORT,
    RANK_HTTP_PORT,
    SUPERVISOR_PORT,
)
from broadbeam_crds.v1alpha1 import Pool, ServingCluster
from broadbeam_operator.local import devices
from broadbeam_operator.local.addresses import NOBODYS, port_is_free

GIB = 2**30
PROCESS_BYTES = 300 * 2**20  # of one rank beside weights and cache: Python, torch, buffers (measured on CPU)


@dataclass(frozen=True, slots=True)
class ThisMachine:
    """What it has to offer."""

    system: str  # os.uname().sysname
    available_bytes: int
    devices: int  # accelerators that are ours to give
    commands: frozenset[str]  # of the engines that are not ours
    port_is_free: Callable[[int], bool]  # false: some server has it on every address
    exists: Callable[[Path], bool]


def look() -> ThisMachine:
    """The machine at hand."""
    commands = frozenset(name for name in ("vllm",) if shutil.which(name))
    return ThisMachine(
        system=os.uname().sysname,
        available_bytes=_available_bytes(),
        devices=len(devices.ours(os.environ, devices.count())),
        commands=commands,
        port_is_free=lambda port: port_is_free(NOBODYS, port),
        exists=Path.exists,
    )


def _available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    available = next((line for line in lines if line.startswith("MemAvailable:")), "MemAvailable: 0 kB")
    return int(available.split()[1]) * 1024


def obstacles(cluster: ServingCluster, machine: ThisMachine, secrets: Collection[str]) -> list[str]:
    """One line each, naming field, value and limit; `secrets` are the names that are at hand."""
    return [
        *_system(machine),
        *_source(cluster, machine),
        *_engine(cluster, machine),
        *_gateway(cluster),
        *_ports(cluster, machine),
        *_secrets(cluster, secrets),
        *_devices(cluster, machine),
        *_memory(cluster, machine),
    ]


def _system(machine: ThisMachine) -> Iterator[str]:
    if machine.system != "Linux":
        yield f"local mode needs Linux (addresses 127.77.x.y, PR_SET_PDEATHSIG); this is {machine.system}"


def _source(cluster: ServingCluster, machine: ThisMachine) -> Iterator[str]:
    source = cluster.spec.model.source
    scheme, _, path = source.partition("://")
    if scheme in ("pvc", "oci"):
        yield f"spec.model.source: {source} needs a cluster; here use file://, hf:// or pypi://"
    if scheme == "file" and cluster.spec.engine.name != "sim" and not machine.exists(Path(path)):
        yield f"spec.model.source: {source}: there is no such file or folder"


def _engine(cluster: ServingCluster, machine: ThisMachine) -> Iterator[str]:
    if cluster.spec.engine.name == "vllm" and "vllm" not in machine.commands:
        yield 'spec.engine.name: vllm: there is no command "vllm" here; install vLLM or use engine broadbeam'


def _gateway(cluster: ServingCluster) -> Iterator[str]:
    if cluster.spec.gateway.replicas == 0:
        yield "spec.gateway.replicas: 0: without a gateway nothing can be asked; set it to 1"


def _ports(cluster: ServingCluster, machine: ThisMachine) -> Iterator[str]:
    """Pods have addresses of their own, but a server on 0.0.0.0 leaves none of them its port."""
    if machine.system != "Linux":
        return
    ranks = range(max(pool.accelerator.per_node for pool in cluster.spec.pools))
    needed = [RANK_HTTP_PORT + i for i in ranks]
    needed += [SUPERVISOR_PORT, GATEWAY_METRICS_PORT]
    needed += [KV_SIDE_CHANNEL_PORT + i for i in ranks] if cluster.spec.kv.transfer else []
    if taken := [port for port in needed if not machine.port_is_free(port)]:
        yield (
            f"port {', '.join(map(str, taken))}: in use on every address of this machine "
            "(a server on 0.0.0.0?); pods need it on theirs: stop that server, or let it listen on 127.0.0.1"
        )


def _secrets(cluster: ServingCluster, at_hand: Collection[str]) -> Iterator[str]:
    wanted = []
    if cluster.spec.gateway.auth:
        wanted.append(("spec.gateway.auth.secretRef.name", cluster.spec.gateway.auth.secret_ref.name))
    for variable in cluster.spec.engine.env:
        if variable.value_from:
            name = variable.value_from.secret_key_ref.name
            wanted.append((f"spec.engine.env[{variable.name}].valueFrom.secretKeyRef.name", name))
    for field, name in wanted:
        if name not in at_hand:
            yield f"{field}: {name}: no such Secret here; give its keys with --secret {name}=FOLDER"


def _devices(cluster: ServingCluster, machine: ThisMachine) -> Iterator[str]:
    pools = [pool for pool in cluster.spec.pools if pool.accelerator.resource != "cpu"]
    needed = sum(_ranks(pool) for pool in pools)
    if needed > machine.devices:
        first = pools[0]
        yield (
            f"spec.pools[{first.name}].accelerator.resource: {first.accelerator.resource}: "
            f"{needed} devices are needed, this machine has {machine.devices}"
        )


def _ranks(pool: Pool) -> int:
    return pool.groups * pool.parallelism.nodes * pool.accelerator.per_node


def _memory(cluster: ServingCluster, machine: ThisMachine) -> Iterator[str]:
    if cluster.spec.engine.name == "sim":
        return
    on_cpu, needed = _on_cpu(cluster), host_bytes(cluster)
    if needed > machine.available_bytes:
        each = ", ".join(f"{c.pool} {c.total_ranks} x {_rank_bytes(c) / GIB:.1f}" for c in on_cpu)
        yield (
            f"not enough memory: the ranks need {needed / GIB:.1f} GiB ({each}), "
            f"{machine.available_bytes / GIB:.1f} GiB is available; "
            "lower spec.pools[].kvCache.memory, groups or parallelism.data"
        )


def host_bytes(cluster: ServingCluster) -> int:
    """What the ranks of CPU pools take of this machine's memory; little where they are simulated."""
    return sum(c.total_ranks * _rank_bytes(c) for c in _on_cpu(cluster))


def _on_cpu(cluster: ServingCluster) -> list[Capacity]:
    pools = zip(capacities(cluster), cluster.spec.pools, strict=True)
    return [c for c, pool in pools if pool.accelerator.resource == "cpu"]


def _rank_bytes(c: Capacity) -> int:
    return (c.needed_bytes or 0) + PROCESS_BYTES
