"""`helm install` of the chart, as a person does it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from build import build

from cluster import Cluster

CHART = Path(__file__).parents[1] / "charts" / "broadbeam"
RELEASE = "broadbeam"
SYSTEM = "broadbeam-system"
ACCOUNT = f"system:serviceaccount:{SYSTEM}:{RELEASE}"  # the operator's user name
IMAGE_VALUES = {
    "BROADBEAM_E2E_RUNTIME_IMAGE": "images.runtime",
    "BROADBEAM_E2E_ROUTER_IMAGE": "images.router",
}


def install(cluster: Cluster) -> None:
    """Install, and wait until the operator's Deployment is Available; AssertionError with logs otherwise."""
    command = [
        *(str(build().helm), f"--kubeconfig={cluster.kubeconfig}", "install", RELEASE, str(CHART)),
        *(f"--namespace={SYSTEM}", "--create-namespace", "--wait", "--timeout=90s"),
        "--set=operator.resyncSeconds=3",
        *(
            f"--set-string={value}={os.environ[name]}"
            for name, value in IMAGE_VALUES.items()
            if name in os.environ
        ),
    ]
    if image := os.environ.get("BROADBEAM_E2E_OPERATOR_IMAGE"):
        repository, _, tag = image.rpartition(":")
        command += [f"--set-string=operator.image.repository={repository},operator.image.tag={tag}"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr + cluster.last_logs()


def uninstall(cluster: Cluster) -> None:
    """For a cluster that outlives the tests."""
    command = [str(build().helm), f"--kubeconfig={cluster.kubeconfig}", "uninstall", RELEASE]
    subprocess.run([*command, f"--namespace={SYSTEM}", "--wait"], capture_output=True)
