"""etcd, API server, controller-manager and scheduler as child processes, ready in a few seconds.

The caller is in a network namespace of its own (`namespaces.isolate`), so ports are the usual ones.
"""

from __future__ import annotations

import ctypes
import json
import secrets
import shutil
import signal
import ssl
import subprocess
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from namespaces import API_SERVER_ADDRESS

URL = f"https://{API_SERVER_ADDRESS}"
ETCD = "http://127.0.0.1:2379"
SERVICE_NETWORK = "10.96.0.0/16"
# user -> groups. The controller-manager may do everything, since its controllers share one identity here
# (one service account each takes it 5 s more to start); the scheduler has the role that RBAC brings for it.
USERS = {
    "admin": "system:masters",
    "system:kube-controller-manager": "system:masters",
    "system:kube-scheduler": "",
}
START_TIMEOUT_S = 60.0
# Who asked for what, for every service account: what an operator may not do, and what it writes at rest.
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [
        {"level": "None", "userGroups": ["system:masters"]},
        {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
        {"level": "None"},
    ],
}
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Run in a child before exec: a parent that is killed takes it along."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class StartError(RuntimeError):
    """A component that did not come up; the message carries the end of its log."""


@dataclass(slots=True)
class ControlPlane:
    """One Kubernetes control plane; `folder` gets certificates, kubeconfigs, logs and etcd's data."""

    binary: Path
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "admin.kubeconfig"

    @property
    def ca_file(self) -> Path:
        return self.folder / "server.crt"

    @property
    def audit_log(self) -> Path:
        """One JSON event a line; the policy is AUDIT_POLICY."""
        return self.folder / "audit.log"

    def start(self) -> None:
        """Start everything and return once the API server says it is ready. StartError otherwise."""
        self.folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([self.binary, "certificates", self.folder, API_SERVER_ADDRESS], check=True)
        tokens = {user: secrets.token_hex(16) for user in USERS}
        lines = [f'{tokens[user]},{user},{user},"{groups}"' for user, groups in USERS.items()]
        (self.folder / "tokens.csv").write_text("\n".join(lines) + "\n")
        (self.folder / "audit-policy.json").write_text(json.dumps(AUDIT_POLICY))
        for user, token in tokens.items():
            self._write_kubeconfig(user, token)
        self._spawn("etcd", _etcd(self.folder))
        self._spawn("kube-apiserver", _api_server(self.folder))
        self._wait_ready(tokens["admin"])
        for name, flags in (("kube-controller-manager", _controller_manager), ("kube-scheduler", _scheduler)):
            self._spawn(name, flags(self.folder))

    def stop(self) -> None:
        """End every process, newest first, and drop etcd's data; certificates and logs stay."""
        for process in reversed(self.processes.values()):
            process.kill()
        for process in self.processes.values():
            process.wait()
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)

    def _spawn(self, name: str, flags: list[str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [self.binary, name, *flags], stdout=log, stderr=log, preexec_fn=die_with_parent
            )

    def _wait_ready(self, token: str) -> None:
        context = ssl.create_default_context(cafile=str(self.ca_file))
        request = urllib.request.Request(f"{URL}/readyz", headers={"Authorization": f"Bearer {token}"})
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise StartError(f"{name} ended with {process.returncode}:\n{self._log_end(name)}")
            try:
                with urllib.request.urlopen(request, timeout=5, context=context):
                    return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise StartError(f"no API server: {error}\n{self._log_end('kube-apiserver')}") from error
            time.sleep(0.05)

    def _log_end(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]

    def _write_kubeconfig(self, user: str, token: str) -> None:
        """Kubeconfigs are JSON, which is YAML."""
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "e2e",
            "clusters": [
                {"name": "e2e", "cluster": {"server": URL, "certificate-authority": str(self.ca_file)}}
            ],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": user}}],
        }
        path = self.folder / f"{user.removeprefix('system:')}.kubeconfig"
        path.write_text(json.dumps(content, indent=2))
        path.chmod(0o600)


def _etcd(folder: Path) -> list[str]:
    return [
        f"--data-dir={folder}/etcd",
        f"--listen-client-urls={ETCD}",
        f"--advertise-client-urls={ETCD}",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def _api_server(folder: Path) -> list[str]:
    return [
        f"--etcd-servers={ETCD}",
        f"--bind-address={API_SERVER_ADDRESS}",
        "--secure-port=443",
        f"--tls-cert-file={folder}/server.crt",
        f"--tls-private-key-file={folder}/server.key",
        f"--token-auth-file={folder}/tokens.csv",
        "--authorization-mode=Node,RBAC",
        f"--service-cluster-ip-range={SERVICE_NETWORK}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={folder}/service-account.key",
        f"--service-account-signing-key-file={folder}/service-account.key",
        "--endpoint-reconciler-type=none",
        f"--audit-policy-file={folder}/audit-policy.json",
        f"--audit-log-path={folder}/audit.log",
        "--profiling=false",
    ]


def _controller_manager(folder: Path) -> list[str]:
    return [
        f"--kubeconfig={folder}/kube-controller-manager.kubeconfig",
        f"--service-account-private-key-file={folder}/service-account.key",
        f"--root-ca-file={folder}/server.crt",
        "--leader-elect=false",
        "--secure-port=0",
        "--profiling=false",
    ]


def _scheduler(folder: Path) -> list[str]:
    return [
        f"--kubeconfig={folder}/kube-scheduler.kubeconfig",
        "--leader-elect=false",
        "--secure-port=0",
        "--profiling=false",
    ]
