"""Watch a LoadProgress while something loads: to the supervisor's pipe, or as a line on a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from broadbeam_runtime.core import LoadProgress
from broadbeam_runtime.status import Status, StatusPipe

INTERVAL_S = 0.2


@contextmanager
def reporting(progress: LoadProgress, pipe: StatusPipe, show: bool = False) -> Iterator[None]:
    """Report `progress` every 0.2 s while the body runs, and once more at its end."""
    over = threading.Event()

    def report() -> None:
        last = ""
        while True:
            ended = over.wait(INTERVAL_S)
            done = None if progress.done is None else round(progress.done, 3)
            pipe.send(Status(progress.stage, done, progress.detail))
            last = _show(progress, last) if show else ""
            if ended:
                return

    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if show and sys.stderr.isatty():
            print(file=sys.stderr)


def _show(progress: LoadProgress, last: str) -> str:
    percent = "" if progress.done is None else f" {progress.done:4.0%}"
    line = f"{progress.stage}{percent} {progress.detail}".rstrip()
    if line != last:
        on_terminal = sys.stderr.isatty()
        print(
            f"\r\x1b[K{line}" if on_terminal else line,
            end="" if on_terminal else "\n",
            file=sys.stderr,
            flush=True,
        )
    return line
