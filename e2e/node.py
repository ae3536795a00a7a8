"""A Kubernetes node without containers: registers itself and runs the pods bound to it as local processes.

    python e2e/node.py --kubeconfig FILE --folder DIR --cache DIR [--gpus 8]

The processes are run by the same pod runner that `broadbeam up` uses. Over that, this node gives each pod a
mount namespace in which its service account lies where client libraries look for it, and the names that
cluster DNS would answer for headless Services (from EndpointSlices, as CoreDNS does).

Images, resource limits and ClusterIPs are not applied. Runs in the network namespace of the control plane.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

from api import Api, ApiError, Object, connect
from broadbeam_crds.conventions import ENV_CACHE, ENV_HOSTS_FILE
from broadbeam_operator.local.container import Backoff
from broadbeam_operator.local.environment import Sources
from broadbeam_operator.local.pods import Node, PodProcess, PodRunner, open_runner
from dns import follow_names
from namespaces import API_SERVER_ADDRESS, set_address
from registration import MANAGER, NODE_NAME, register, renew_lease

TOKEN_S = 3607
GONE = (404, 409, 422)  # the pod is gone, or there is another of its name
INHERITED = ("HOME", "PYTHONPATH", "XDG_CACHE_HOME")  # what takes the place of an image

# Runs before a pod's own command, in a mount namespace of its own. Client libraries have the path of the
# service account written into them, and kopf the name kubernetes.default.svc. The folder comes from the
# environment, since the pod runner rewrites paths in arguments; $1 is the pod's uid.
ENV_FOLDER = "BROADBEAM_E2E_NODE"
MOUNT = f"""
accounts=/run/secrets/kubernetes.io/serviceaccount
mount --bind "${ENV_FOLDER}/hosts.pod" /etc/hosts && mount --bind "${ENV_FOLDER}/tokens/$1" /mnt &&
mount -t tmpfs pod /run && mkdir -p $accounts && mount --move /mnt $accounts && shift && exec "$@"
"""


@dataclass(slots=True)
class Kubelet:
    """Keeps the processes of this machine equal to the pods that are bound to the node."""

    api: Api
    runner: PodRunner
    folder: Path
    ca_file: Path
    pods: dict[str, PodProcess] = field(default_factory=dict)  # by uid
    dirty: asyncio.Event = field(default_factory=asyncio.Event)
    changed: dict[str, PodProcess] = field(default_factory=dict)  # by uid: status to be written
    stopping: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    addresses_given: int = 0

    async def follow_pods(self) -> None:
        async for kind, obj in self.api.watch("/api/v1/pods", f"fieldSelector=spec.nodeName={NODE_NAME}"):
            if kind == "SYNC":
                found = {pod["metadata"]["uid"]: pod for pod in obj["items"]}
                for pod in found.values():
                    await self.observe(pod)
                for uid in self.pods.keys() - found.keys():
                    self.end(uid, 0)
            elif kind == "DELETED":
                self.end(obj["metadata"]["uid"], 0)
            else:
                await self.observe(obj)

    async def observe(self, pod: Object) -> None:
        """Start, tell or stop the process of a pod as its object asks."""
        meta = pod["metadata"]
        uid = meta["uid"]
        if meta.get("deletionTimestamp"):
            if uid in self.pods:
                self.end(uid, float(meta.get("deletionGracePeriodSeconds") or 0))
            else:
                await self.forget(pod)
        elif uid in self.pods:
            conditions = (pod.get("status") or {}).get("conditions") or ()
            self.pods[uid].set_gates({c["type"]: c["status"] == "True" for c in conditions})
        elif (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed"):
            try:
                await self.start(pod)
            except ApiError as error:
                if error.status not in GONE:
                    raise

    async def start(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        token = await self.mint_token(pod)
        self.addresses_given += 1
        address = pod_address(self.addresses_given)
        set_address(self.addresses_given, address)
        manifest = in_mount_namespace({"apiVersion": "v1", "kind": "Pod", **pod})
        self.pods[uid] = self.runner.start(manifest, address, lambda process: self.tell(uid, process), token)

    async def mint_token(self, pod: Object) -> Path:
        """A folder with what the service account volume of the pod holds."""
        meta, spec = pod["metadata"], pod["spec"]
        account = spec.get("serviceAccountName", "default")
        bound = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": TOKEN_S, "boundObjectRef": bound},
        }
        path = f"/api/v1/namespaces/{meta['namespace']}/serviceaccounts/{account}/token"
        answer = await self.api.call("POST", path, request)
        folder = self.folder / "tokens" / str(meta["uid"])
        folder.mkdir(parents=True)
        (folder / "token").write_text(str(answer["status"]["token"]))
        (folder / "ca.crt").write_bytes(self.ca_file.read_bytes())
        (folder / "namespace").write_text(meta["namespace"])
        return folder

    def tell(self, uid: str, process: PodProcess) -> None:
        self.changed[uid] = process
        self.dirty.set()

    async def write_statuses(self) -> None:
        """Write what changed; several changes of a pod meanwhile become one write."""
        while True:
            await self.dirty.wait()
            self.dirty.clear()
            batch, self.changed = self.changed, {}
            await asyncio.gather(*(self.write_status(uid, process) for uid, process in batch.items()))

    async def write_status(self, uid: str, process: PodProcess) -> None:
        # Server-side apply, since the conditions of others (readiness gates) are to stay.
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": process.name, "namespace": process.facts.namespace, "uid": uid},
            "status": process.status(),
        }
        path = f"/api/v1/namespaces/{process.facts.namespace}/pods/{process.name}/status"
        try:
            await self.api.apply(path, body, MANAGER)
        except ApiError as error:
            if error.status not in GONE:
                raise

    def end(self, uid: str, grace_s: float) -> None:
        """Stop a pod in the background; again with less grace if it is already stopping."""
        process = self.pods.get(uid)
        if process is None:
            return
        if uid in self.stopping:
            asyncio.ensure_future(process.stop(grace_s))  # noqa: RUF006 - the first stop waits for the end
            return
        self.stopping[uid] = asyncio.create_task(self.stop(uid, process, grace_s))

    async def stop(self, uid: str, process: PodProcess, grace_s: float) -> None:
        await process.stop(grace_s)
        keep_logs(process, self.folder / "logs")
        await self.runner.stop(process, 0)
        await self.forget(dict(process.facts.manifest))
        del self.pods[uid], self.stopping[uid]

    async def forget(self, pod: Object) -> None:
        """Tell the API server that nothing of a deleted pod runs any more."""
        meta = pod["metadata"]
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": meta["uid"]}}
        with contextlib.suppress(ApiError):  # gone already
            await self.api.call(
                "DELETE", f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}", options
            )


def keep_logs(process: PodProcess, folder: Path) -> None:
    """Copy the logs of a pod that is about to vanish."""
    with contextlib.suppress(OSError):
        shutil.copytree(process.root / "logs", folder / process.root.parent.name / process.root.name)


def pod_address(number: int) -> str:
    """An address for each pod that there ever was: a stale one leads nowhere, not to another pod."""
    third, fourth = divmod(number, 250)
    return f"10.77.{third + 1}.{fourth + 1}"


def in_mount_namespace(pod: Object) -> Object:
    """The pod with the command of every container started through MOUNT."""

    def wrapped(container: Object) -> Object:
        if not container.get("command"):
            return container
        before = ["unshare", "--mount", "sh", "-c", MOUNT, "sh", pod["metadata"]["uid"]]
        return {**container, "command": [*before, *container["command"]]}

    spec = dict(pod["spec"])
    for key in ("initContainers", "containers"):
        if key in spec:
            spec[key] = [wrapped(container) for container in spec[key]]
    return {**pod, "spec": spec}


def machine(api: Api, folder: Path, cache: Path) -> Node:
    async def look_up(plural: str, namespace: str, name: str) -> Object | None:
        try:
            return await api.call("GET", f"/api/v1/namespaces/{namespace}/{plural}/{name}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    bin_dir = Path(sys.executable).parent
    return Node(
        name=NODE_NAME,
        root=folder / "pods",
        sources=Sources(
            config_map=lambda namespace, name: look_up("configmaps", namespace, name),
            secret=lambda namespace, name: look_up("secrets", namespace, name),
        ),
        bin_dir=bin_dir,
        inherited={
            **{name: os.environ[name] for name in INHERITED if name in os.environ},
            "PATH": f"{bin_dir}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        },
        imposed={
            ENV_FOLDER: str(folder),
            ENV_HOSTS_FILE: str(folder / "hosts"),
            ENV_CACHE: str(cache),
            "KUBERNETES_SERVICE_HOST": API_SERVER_ADDRESS,
            "KUBERNETES_SERVICE_PORT": "443",
        },
        backoff=Backoff(),
    )


async def run(kubeconfig: Path, folder: Path, cache: Path, gpus: int) -> None:
    """Be a node until SIGTERM; every process is gone afterwards."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hosts").touch()
    (folder / "hosts.pod").write_text(
        f"127.0.0.1 localhost\n{API_SERVER_ADDRESS} kubernetes.default.svc kubernetes.default kubernetes\n"
    )
    async with connect(kubeconfig) as api, open_runner(machine(api, folder, cache)) as runner:
        kubelet = Kubelet(api, runner, folder, kubeconfig.with_name("server.crt"))
        await register(api, gpus)
        duties = [
            asyncio.create_task(duty)
            for duty in (
                renew_lease(api),
                follow_names(api, folder / "hosts"),
                kubelet.follow_pods(),
                kubelet.write_statuses(),
                stop.wait(),
            )
        ]
        done, pending = await asyncio.wait(duties, return_when=asyncio.FIRST_COMPLETED)
        for duty in pending:
            duty.cancel()
        for duty in done:
            duty.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kubeconfig", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for pods' files and logs")
    parser.add_argument("--cache", type=Path, required=True, help="models, the same for all pods")
    parser.add_argument("--gpus", type=int, default=0, help="nvidia.com/gpu to offer")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.kubeconfig, arguments.folder, arguments.cache, arguments.gpus))


if __name__ == "__main__":
    main()
