"""The folder of one running `up`: pods' files and logs, names, endpoints. Those of dead ones are cleaned."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

LOCK = ".lock"  # held by the process that owns the folder


@contextmanager
def run_folder(runs: Path, cluster: str) -> Iterator[Path]:
    """A new `runs`/CLUSTER-… for the length of the body; stays, for its logs, if the body raises."""
    runs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with locked(runs / LOCK):  # nobody cleans a folder between its making and its lock
            clean(runs)
            folder = Path(mkdtemp(prefix=f"{cluster}-", dir=runs))
            held.enter_context(locked(folder / LOCK))
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The file is locked for the length of the body, or until this process ends."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
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
