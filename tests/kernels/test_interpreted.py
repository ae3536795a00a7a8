"""The Triton kernels' arithmetic without a GPU: under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_the_kernels_agree_with_their_oracles_under_the_interpreter() -> None:
    tests = Path(__file__).with_name("interpreted_kernels.py")
    # Overflow is part of the arithmetic, and numpy, which the interpreter computes with, warns of it.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", str(tests)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
