"""`broadbeam`: where the program begins."""

from __future__ import annotations

import signal


def main() -> None:
    # What follows takes half a second to import: Ctrl-C ends it as it ends any program, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from broadbeam_operator.commands import app

    app()


if __name__ == "__main__":
    main()
