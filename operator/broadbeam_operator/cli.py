"""`broadbeam`: where the program begins."""

from __future__ import annotations

import io
import os
import signal
import sys


def main() -> None:
    # What follows takes half a second to import: Ctrl-C ends it as it ends any program, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - started with it closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer may hold what this terminal cannot show
    try:
        from broadbeam_operator.commands import app
    except ModuleNotFoundError as error:  # an image of one process holds that process's extra alone
        sys.exit(f"broadbeam: {error.name} is not installed: pip install 'broadbeam[operator]'")
    try:
        app()
    except OSError as error:  # a file that cannot be read, an output that cannot be written
        discard_output()
        print(f"broadbeam: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        sys.exit(1)


def discard_output() -> None:
    """What is still to be written goes nowhere, where it can go nowhere else."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
