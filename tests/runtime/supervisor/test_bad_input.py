"""What a person can get wrong about a model or its memory: one line, a status, and no process left."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broadbeam_runtime import checkpoint

StartPod = Callable[..., Any]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(cache: Path) -> Path:
    """A model that can be served."""
    return checkpoint.prepare("tiny://llama", cache)


def torch_pod(source: str, max_model_len: int | None = 1024, **changes: Any) -> dict[str, Any]:
    model = {"name": "m", "source": source, "max_model_len": max_model_len}
    return {"engine": "broadbeam", "role": "both", "model": model, "threads": 1} | changes


def processes_of(host: str) -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if host.encode() in line.split(b"\0"):
            lines.append(line.decode())
    return lines


def said(pod: Any) -> str:
    """The pod's one line, once it has ended as it should."""
    assert pod.process.wait(120) == 1
    (line,) = pod.log.read_text().splitlines()
    assert not processes_of(pod.host)
    return str(line)


def no_file(folder: Path) -> str:
    return "nowhere.gguf"


def cut_gguf(folder: Path) -> str:
    (folder / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 5))
    return "cut.gguf"


def cut_weights(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    return ""


def large_tokenizer(folder: Path) -> str:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_bytes())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 5000, "content": "<|more|>"})
    path.write_text(json.dumps(tokenizer))
    return ""


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(no_file, "nowhere.gguf: no such file", id="no such file"),
        pytest.param(cut_gguf, "cut.gguf: cut off, or not a GGUF file", id="a GGUF file cut off"),
        pytest.param(cut_weights, "model.safetensors: 100,000 bytes long instead of", id="weights cut off"),
        pytest.param(
            large_tokenizer,
            "has token id 5000, but the model's vocab_size is 2048: they do not belong together",
            id="a tokenizer larger than the embedding",
        ),
    ],
)
def test_a_model_that_cannot_be_served_is_one_line(
    spoil: Callable[[Path], str], message: str, whole: Path, tmp_path: Path, start_pod: StartPod
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    source = f"file://{folder / spoil(folder)}"
    line = said(start_pod(torch_pod(source), "--cache", str(tmp_path / "cache")))
    assert line.startswith(f"broadbeam-runtime: model {source}: ")
    assert message in line


def test_too_little_memory_for_the_kv_pool_is_one_line(start_pod: StartPod, whole: Path, cache: Path) -> None:
    source = f"file://{whole}"
    pods = {
        "cache.memory_bytes is 1,000 bytes, but one sequence of model.max_model_len = 1024": torch_pod(
            source, cache={"memory_bytes": 1000}
        ),
        "cache.memory_bytes is 1,048,576.0 MiB, but only": torch_pod(source, cache={"memory_bytes": 1 << 40}),
        "model.max_model_len is 5000, the model's own limit is 4096": torch_pod(source, max_model_len=5000),
        "cache.memory_bytes is 10, but one block of 16 tokens needs": torch_pod(
            "sim://", engine="sim", cache={"memory_bytes": 10}
        ),
    }
    started = {message: start_pod(config, "--cache", str(cache)) for message, config in pods.items()}
    for message, pod in started.items():
        assert message in said(pod)
