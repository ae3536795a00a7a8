"""A command beside a control plane of its own: `python e2e/with_cluster.py COMMAND …`.

The command finds the cluster by BROADBEAM_E2E_KUBECONFIG; it has the CRD, its controllers and no node. Ends
with the command's exit status, and nothing is left running.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "controlplane")]

from build import build  # noqa: E402 - from the path above

from control_plane import ControlPlane, StartError, die_with_parent  # noqa: E402
from namespaces import IsolationError, isolate  # noqa: E402

CRD = HERE.parent / "crds" / "servingclusters.yaml"
KUBECTL = Path(sys.executable).with_name("kubectl")
CRD_NAME = "crd/servingclusters.serving.broadbeam.io"


def run(command: list[str], folder: Path) -> int:
    """The exit status of `command`; StartError or CalledProcessError if there is no cluster for it."""
    plane = ControlPlane(build().controlplane, folder)
    try:
        plane.start()
        kubectl = [str(KUBECTL), f"--kubeconfig={plane.kubeconfig}"]
        subprocess.run([*kubectl, "apply", "--server-side", f"--filename={CRD}"], check=True, stdout=2)
        subprocess.run([*kubectl, "wait", CRD_NAME, "--for=condition=Established"], check=True, stdout=2)
        environment = {**os.environ, "BROADBEAM_E2E_KUBECONFIG": str(plane.kubeconfig)}
        return subprocess.run(command, env=environment, preexec_fn=die_with_parent).returncode
    finally:
        plane.stop()


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: python e2e/with_cluster.py COMMAND …", file=sys.stderr)
        return 2
    try:
        isolate()
        with tempfile.TemporaryDirectory(prefix="broadbeam-cluster-") as folder:
            return run(sys.argv[1:], Path(folder))
    except (IsolationError, StartError, subprocess.CalledProcessError) as error:
        print(f"with_cluster: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
