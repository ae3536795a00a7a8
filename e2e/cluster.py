"""What the tests do to a cluster: kubectl, the API by way of `kubectl proxy`, and processes of pods.

All of it works on any cluster that a kubeconfig reaches; only signals take another way on our own node, which
has no `kubectl exec`.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from broadbeam_crds.conventions import (
    API_GROUP,
    API_VERSION,
    GATEWAY_PORT,
    LABEL_CLUSTER,
    PLURAL,
    SUPERVISOR_PORT,
)
from broadbeam_operator.local.exposition import samples, total
from control_plane import die_with_parent

KUBECTL = Path(sys.executable).with_name("kubectl")
POLL_S = 0.1
# Kinds that a ServingCluster may leave behind.
CHILDREN = (
    "statefulsets,deployments,replicasets,pods,services,endpointslices,configmaps,serviceaccounts,"
    "roles,rolebindings,poddisruptionbudgets"
)

Object = dict[str, Any]
T = TypeVar("T")

# Sends signal argv[3] to processes of pod argv[2] in namespace argv[1] whose command line matches argv[4];
# prints how many. Run on the node (ours), or in the container through kubectl exec.
SIGNAL = """
import os, re, sys
from pathlib import Path
namespace, pod, signum, pattern = sys.argv[1:]
mine = {f"BROADBEAM_POD_NAME={pod}".encode(), f"BROADBEAM_NAMESPACE={namespace}".encode()}
sent = 0
for process in Path("/proc").glob("[0-9]*"):
    try:
        environment = set((process / "environ").read_bytes().split(b"\\0"))
        command = (process / "cmdline").read_bytes().replace(b"\\0", b" ").decode()
        if mine <= environment and re.search(pattern, command):
            os.kill(int(process.name), int(signum))
            sent += 1
    except OSError:
        pass
print(sent)
"""
RANKS = r"broadbeam[-_]runtime.* rank "


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer, whatever its status."""

    status: int
    body: str
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def eventually(check: Callable[[], T | None], timeout_s: float, what: str) -> T:
    """The first truthy answer of `check`; AssertionError with the last one if none comes."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = check()
        if seen:
            return seen
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}; last seen: {seen!r}"
        time.sleep(POLL_S)


@dataclass(slots=True)
class Cluster:
    """A Kubernetes cluster with the operator installed."""

    kubeconfig: Path
    folder: Path  # for logs
    audit_log: Path | None  # only our own control plane has one
    url: str = ""
    _proxy: subprocess.Popen[str] | None = field(default=None)

    @property
    def is_ours(self) -> bool:
        return self.audit_log is not None

    def __enter__(self) -> Cluster:
        """Start `kubectl proxy`, which knows every way to authenticate."""
        command = [str(KUBECTL), f"--kubeconfig={self.kubeconfig}", "proxy", "--port=0"]
        self._proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
        assert self._proxy.stdout is not None
        line = self._proxy.stdout.readline()
        match = re.search(r"127\.0\.0\.1:\d+", line)
        assert match, f"kubectl proxy said {line!r}"
        self.url = f"http://{match[0]}"
        return self

    def __exit__(self, *_: object) -> None:
        if self._proxy is not None:
            self._proxy.kill()
            self._proxy.wait()
            assert self._proxy.stdout is not None
            self._proxy.stdout.close()

    def run(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """One kubectl command, failed or not."""
        command = [str(KUBECTL), f"--kubeconfig={self.kubeconfig}", *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=180)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """What a kubectl command prints; AssertionError if it fails."""
        answer = self.run(*arguments, stdin=stdin)
        assert answer.returncode == 0, f"kubectl {' '.join(arguments)}: {answer.stderr}"
        return answer.stdout

    def apply(self, *objects: Object) -> str:
        """What `kubectl apply` says of these objects."""
        return self.kubectl("apply", "-f", "-", stdin="\n---\n".join(json.dumps(o) for o in objects))

    def http(
        self, path: str, body: Object | None = None, method: str | None = None, timeout_s: float = 60
    ) -> Answer:
        """One request to the API server; a pod or service behind it by its `proxy` subresource."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return Answer(response.status, _read(response).decode(), dict(response.headers))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read().decode(), dict(error.headers))

    def get(self, path: str) -> Object | None:
        """The object at an API path, None if there is none."""
        answer = self.http(path)
        if answer.status == 404:
            return None
        assert answer.status == 200, f"{path}: {answer.status} {answer.body}"
        found: Object = answer.json
        return found

    def serving(self, namespace: str, name: str) -> Serving:
        return Serving(self, namespace, name)

    def last_logs(self) -> str:
        """The ends of the logs of our own node and of its pods, for the message of a failure."""
        found = [log.read_text(errors="replace")[-1500:] for log in self.folder.glob("node.log")]
        for container in sorted(self.folder.glob("node/pods/*/*/logs/*")):
            log = max(container.glob("*.log"), key=lambda path: path.stat().st_mtime, default=None)
            if log is not None:
                found.append(f"--- {log.relative_to(self.folder)}\n{log.read_text(errors='replace')[-1500:]}")
        return "\n".join(found)


@dataclass(frozen=True, slots=True)
class Serving:
    """One ServingCluster and what belongs to it."""

    cluster: Cluster
    namespace: str
    name: str

    @property
    def path(self) -> str:
        return f"/apis/{API_GROUP}/{API_VERSION}/namespaces/{self.namespace}/{PLURAL}/{self.name}"

    @property
    def status(self) -> Object:
        found = self.cluster.get(self.path)
        return dict((found or {}).get("status") or {})

    def condition(self, kind: str) -> Object | None:
        return next((c for c in self.status.get("conditions") or () if c["type"] == kind), None)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self.cluster.kubectl(f"--namespace={self.namespace}", *arguments, stdin=stdin)

    def pods(self, **labels: str) -> list[Object]:
        """Pods of the cluster with these labels (`pool`, `group`, `component` …)."""
        selector = [f"{LABEL_CLUSTER}={self.name}"]
        selector += [f"{API_GROUP}/{key}={value}" for key, value in labels.items()]
        path = f"/api/v1/namespaces/{self.namespace}/pods?labelSelector={','.join(selector)}"
        found = self.cluster.get(path)
        assert found is not None
        return list(found["items"])

    def patch(self, *operations: Object) -> None:
        """A JSON patch of the ServingCluster."""
        patch = json.dumps(list(operations))
        self.kubectl("patch", "servingcluster", self.name, "--type=json", f"--patch={patch}")

    def wait_available(self, timeout_s: float = 60) -> Object:
        """The status once the operator has seen the newest spec and the cluster is at rest and Available."""

        def settled() -> Object | None:
            found = self.cluster.get(self.path)
            status = (found or {}).get("status") or {}
            conditions = {c["type"]: c["status"] for c in status.get("conditions") or ()}
            newest = found and status.get("observedGeneration") == found["metadata"]["generation"]
            rest = conditions.get("Available") == "True" and conditions.get("Progressing") == "False"
            complete = all(
                p["readyGroups"] == p["updatedGroups"] == p["groups"] for p in status.get("pools") or ()
            )
            return status if newest and rest and complete else None

        try:
            return eventually(settled, timeout_s, f"{self.name} Available")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.describe()}") from None

    def describe(self) -> str:
        return self.kubectl("get", "servingclusters,pods", "-o=wide") + json.dumps(self.status, indent=1)

    def ask(self, prompt: str, **fields: Any) -> Answer:
        """One completion through the gateway's Service."""
        model = (self.cluster.get(self.path) or {})["spec"]["model"]["name"]
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}
        return self.cluster.http(f"{self.gateway}/v1/completions", body)

    @property
    def gateway(self) -> str:
        """API path that leads to the gateway."""
        return f"/api/v1/namespaces/{self.namespace}/services/{self.name}-gateway:{GATEWAY_PORT}/proxy"

    def stream(self, prompt: str, **fields: Any) -> list[Object]:
        """The chunks of a streamed completion; AssertionError unless it ends in [DONE]."""
        answer = self.ask(prompt, stream=True, **fields)
        assert answer.status == 200, answer.body
        events = [
            line.removeprefix("data: ") for line in answer.body.splitlines() if line.startswith("data: ")
        ]
        assert events[-1:] == ["[DONE]"], answer.body
        return [json.loads(event) for event in events[:-1]]

    def metric(self, pod: str, port: int, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}:{port}/proxy/metrics"
        answer = self.cluster.http(path)
        assert answer.status == 200, answer.body
        return total(samples(answer.body), name, **labels)

    def pool_metric(self, pool: str, name: str, **labels: str) -> float:
        """A metric summed over the supervisors of a pool."""
        return sum(
            self.metric(pod["metadata"]["name"], SUPERVISOR_PORT, name, **labels)
            for pod in self.pods(pool=pool)
        )

    def signal(self, pod: str, signum: signal.Signals, pattern: str = RANKS) -> int:
        """Send a signal to processes of a pod; how many there were."""
        arguments = [SIGNAL, self.namespace, pod, str(int(signum)), pattern]
        if self.cluster.is_ours:
            answer = subprocess.run(
                [sys.executable, "-c", *arguments], capture_output=True, text=True, check=True
            )
            return int(answer.stdout)
        return int(self.kubectl("exec", pod, "--", "python", "-c", *arguments))

    def delete(self) -> None:
        self.kubectl("delete", "servingcluster", self.name, "--ignore-not-found")

    def leftovers(self) -> list[str]:
        """Objects that still carry the cluster's label."""
        listed = self.kubectl("get", CHILDREN, f"--selector={LABEL_CLUSTER}={self.name}", "--output=name")
        return listed.split()


def _read(response: http.client.HTTPResponse) -> bytes:
    """The body, also of an answer that broke off."""
    try:
        return response.read()
    except http.client.IncompleteRead as error:
        return error.partial


def text_of(chunks: list[Object]) -> str:
    """The text of a streamed completion."""
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
