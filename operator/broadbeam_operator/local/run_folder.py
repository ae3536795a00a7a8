"""The folder of one running `up`: pods' files and logs, names, endpoints. Those of dead ones are cleaned."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"  # held by the process that owns the folder


@contextmanager
def run_folder(runs: Path, cluster: str) -> Iterator[Path]:
    """`runs`/CLUSTER-PID for the length of the body; stays behind, for its logs, if the body raises."""
    runs.mkdir(parents=True, exist_ok=True)
    clean(runs)
    folder = runs / f"{cluster}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier process with our number
    folder.mkdir()
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def clean(runs: Path) -> None:
    """Remove the folders whose owner is gone; the kernel dropped its lock, however it ended."""
    for folder in runs.iterdir():
        with suppress(OSError):
            handle = os.open(folder / LOCK, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)
