"""What cluster DNS would answer for the pods of headless Services, as a hosts file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from api import Api, Object


async def follow_names(api: Api, hosts: Path) -> None:
    """Keep `hosts` at what cluster DNS would answer for pods of headless Services."""
    slices: dict[str, Object] = {}
    async for kind, obj in api.watch("/apis/discovery.k8s.io/v1/endpointslices"):
        if kind == "SYNC":
            slices = {one["metadata"]["uid"]: one for one in obj["items"]}
        elif kind == "DELETED":
            slices.pop(obj["metadata"]["uid"], None)
        else:
            slices[obj["metadata"]["uid"]] = obj
        partial = hosts.with_suffix(".partial")
        partial.write_text("".join(f"{address} {name}\n" for address, name in names(slices.values())))
        partial.replace(hosts)


def names(slices: Iterable[Object]) -> list[tuple[str, str]]:
    """(address, name) of every routable endpoint with a hostname."""
    found = []
    for one in slices:
        meta = one["metadata"]
        service = (meta.get("labels") or {}).get("kubernetes.io/service-name")
        for endpoint in one.get("endpoints") or ():
            if service and endpoint.get("hostname") and endpoint["conditions"].get("ready", True):
                domain = f"{endpoint['hostname']}.{service}.{meta['namespace']}.svc"
                found += [
                    (a, name) for a in endpoint["addresses"] for name in (domain, f"{domain}.cluster.local")
                ]
    return sorted(found)
