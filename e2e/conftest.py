"""A Kubernetes cluster for the session with the operator installed by its chart.

BROADBEAM_E2E_KUBECONFIG names a cluster to use instead of starting one; then BROADBEAM_E2E_OPERATOR_IMAGE,
BROADBEAM_E2E_RUNTIME_IMAGE and BROADBEAM_E2E_ROUTER_IMAGE name the images that it shall run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "controlplane")]

from build import build  # noqa: E402 - from the path above

from cluster import Cluster  # noqa: E402
from control_plane import ControlPlane, die_with_parent  # noqa: E402
from namespaces import IsolationError, isolate  # noqa: E402

CHART = HERE.parent / "charts" / "broadbeam"
RELEASE = "broadbeam"
SYSTEM = "broadbeam-system"
IMAGE_VALUES = {
    "BROADBEAM_E2E_RUNTIME_IMAGE": "images.runtime",
    "BROADBEAM_E2E_ROUTER_IMAGE": "images.router",
}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    given = os.environ.get("BROADBEAM_E2E_KUBECONFIG")
    with ExitStack() as stack:
        found = Cluster(Path(given), folder, None) if given else stack.enter_context(started(folder))
        found.open()
        stack.callback(found.close)
        yield found


@pytest.fixture(scope="session")
def operator(cluster: Cluster) -> Cluster:
    """The cluster once `helm install` has made its operator ready."""
    install(cluster)
    return cluster


@contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """Our own control plane and node, in a network namespace; everything is gone afterwards."""
    try:
        isolate()
    except IsolationError as error:
        pytest.fail(str(error), pytrace=False)
    plane = ControlPlane(build().controlplane, folder)
    node: subprocess.Popen[bytes] | None = None
    try:
        plane.start()
        arguments = [f"--kubeconfig={plane.kubeconfig}", f"--folder={folder}/node", "--gpus=8"]
        with (folder / "node.log").open("wb") as log:
            node = subprocess.Popen(
                [sys.executable, str(HERE / "node.py"), *arguments],
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )
        yield Cluster(plane.kubeconfig, folder, plane.audit_log)
    finally:
        if node is not None:
            node.terminate()
            node.wait()
        plane.stop()


def install(cluster: Cluster) -> None:
    """`helm install`, and wait until the operator's Deployment is Available."""
    command = [
        *(str(build().helm), f"--kubeconfig={cluster.kubeconfig}", "install", RELEASE, str(CHART)),
        *(f"--namespace={SYSTEM}", "--create-namespace", "--wait", "--timeout=90s"),
        *(f"--set={value}={os.environ[name]}" for name, value in IMAGE_VALUES.items() if name in os.environ),
    ]
    if image := os.environ.get("BROADBEAM_E2E_OPERATOR_IMAGE"):
        repository, _, tag = image.rpartition(":")
        command += [f"--set=operator.image.repository={repository},operator.image.tag={tag}"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr + last_logs(cluster)


def last_logs(cluster: Cluster) -> str:
    """The end of every pod's log on our own node, for the message of a failure."""
    found = []
    for log in sorted(cluster.folder.glob("node/pods/*/*/logs/*/*.log")):
        found.append(f"--- {log.relative_to(cluster.folder)}\n{log.read_text(errors='replace')[-1500:]}")
    return "\n".join(found)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed and isinstance(found := getattr(item, "funcargs", {}).get("cluster"), Cluster):
        report.sections.append(("logs of the pods", last_logs(found)))
        report.sections.append(("logs of the cluster", f"in {found.folder}"))
