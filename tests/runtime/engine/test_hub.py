"""hf:// sources: the real client of the hub, against a small hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from broadbeam_runtime import checkpoint

REPOSITORY = "acme/tiny-llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of `folder` as one repository; `asked` are the paths it was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        files = sorted(self.server.folder.iterdir())
        api = f"/api/models/{REPOSITORY}"
        if self.path.startswith(f"{api}/revision/main"):
            siblings = [{"rfilename": file.name} for file in files]
            self._answer(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode())
        elif self.path.startswith(f"{api}/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT}
                for file in files
            ]
            self._answer(json.dumps(tree).encode())
        else:
            self._file()

    def do_HEAD(self) -> None:
        self._file()

    def _file(self) -> None:
        path = self.server.folder / self.path.rsplit("/", 1)[-1]
        if self.path.startswith(f"/{REPOSITORY}/resolve/{COMMIT}/") and path.is_file():
            self._answer(path.read_bytes())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """The test's output is no place for an access log."""


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    with Hub(folder) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = checkpoint.prepare("tiny://llama", tmp_path / "made")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle, which must not even be fetched")
    with serving(folder) as hub:
        yield hub


def fetch(source: str, cache: Path, hub_url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "broadbeam_runtime", "fetch", source, "--cache", str(cache)]
    environment = os.environ | {"HF_ENDPOINT": hub_url, "HF_HUB_OFFLINE": "0", "DO_NOT_TRACK": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_repository_of_the_hub_becomes_a_directory_and_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    done = fetch(f"hf://{REPOSITORY}", tmp_path / "cache", hub.url)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (path / name).read_bytes() == (hub.folder / name).read_bytes()
    assert not (path / "pytorch_model.bin").exists()

    hub.asked.clear()
    again = fetch(f"hf://{REPOSITORY}", tmp_path / "cache", hub.url)
    assert again.stdout == done.stdout
    assert not [path for path in hub.asked if path.endswith(".safetensors")]


def test_a_repository_that_the_hub_does_not_have_is_one_line(hub: Hub, tmp_path: Path) -> None:
    done = fetch("hf://acme/nothing", tmp_path, hub.url)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("broadbeam-runtime: hf://acme/nothing: ")
    assert "Traceback" not in done.stderr


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    with serving(tmp_path) as gone:
        url = gone.url
    done = fetch(f"hf://{REPOSITORY}", tmp_path, url)
    assert done.returncode == 1
    assert f"hf://{REPOSITORY}: " in done.stderr
    assert "Traceback" not in done.stderr
