"""Prepare a model in the cache: run by `broadbeam-runtime fetch`, and once per pod by its supervisor."""

from __future__ import annotations

import sys

from broadbeam_runtime.core import LoadProgress
from broadbeam_runtime.progress import reporting
from broadbeam_runtime.status import Status, StatusPipe


def run(source: str, cache_dir: str, status_fd: int | None) -> int:
    """Fetch, convert, print the directory; one line and status 1 when the model cannot be had."""
    from broadbeam_runtime import checkpoint

    pipe = StatusPipe(status_fd)
    progress = LoadProgress(stage="fetching model")
    try:
        with reporting(progress, pipe, show=status_fd is None):
            path = str(checkpoint.prepare(source, cache_dir, progress))
    except (ValueError, OSError, MemoryError) as error:
        pipe.send(Status("failed", error=str(error) or type(error).__name__))
        if status_fd is None:  # the supervisor says it otherwise, once
            print(f"broadbeam-runtime: {error}", file=sys.stderr)
        return 1
    pipe.send(Status("fetched", path=path))
    if status_fd is None:
        print(path)
    return 0
