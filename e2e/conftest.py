"""A Kubernetes cluster for the session with the operator installed by its chart.

BROADBEAM_E2E_KUBECONFIG names a cluster to use instead of starting one; then BROADBEAM_E2E_OPERATOR_IMAGE,
BROADBEAM_E2E_RUNTIME_IMAGE and BROADBEAM_E2E_ROUTER_IMAGE name the images that it shall run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "controlplane")]

from build import build  # noqa: E402 - from the path above

from broadbeam_crds.conventions import ENV_CACHE  # noqa: E402
from broadbeam_crds.v1alpha1 import load_manifest  # noqa: E402
from cluster import Cluster  # noqa: E402
from control_plane import ControlPlane, die_with_parent  # noqa: E402
from installation import install, uninstall  # noqa: E402
from namespaces import IsolationError, isolate  # noqa: E402

# As a newcomer would read them; rights are judged by what all the others did.
ORDER = (
    *("test_install", "test_refusals", "test_serving", "test_names"),
    *("test_wide_ep", "test_laptop", "test_faults", "test_rights"),
)
CACHE = Path(os.environ.get(ENV_CACHE, Path.home() / ".cache" / "broadbeam"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    if given := os.environ.get("BROADBEAM_E2E_KUBECONFIG"):
        with Cluster(Path(given), folder, None) as found:
            yield found
    else:
        if any(item.path.stem == "test_laptop" for item in request.session.items):
            fetch_model()
        with started(folder) as found, found:
            yield found


@pytest.fixture(scope="session")
def operator(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster once `helm install` has made its operator ready."""
    install(cluster)
    yield cluster
    if not cluster.is_ours:
        uninstall(cluster)


def fetch_model() -> None:
    """The laptop's model into the cache that the node gives its pods, as `make demo` does. Before there is a
    network namespace: nothing in it reaches a registry."""
    source = load_manifest(HERE.parent / "examples" / "laptop.yaml").spec.model.source
    command = [str(Path(sys.executable).with_name("broadbeam-runtime")), "fetch", source, f"--cache={CACHE}"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


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
        arguments = [f"--kubeconfig={plane.kubeconfig}", f"--folder={folder}/node", f"--cache={CACHE}"]
        arguments += ["--gpus=8"]
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.stem))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    found = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(found, Cluster):
        report.sections.append((f"pods' logs, all logs in {found.folder}", found.last_logs()))
    return report
