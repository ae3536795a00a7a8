"""`kernels/measure.sh`: tests once, then timings in parts. Its Python here only writes down its arguments."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "kernels" / "measure.sh"
PYTHON = """\
#!/bin/sh
echo "$@" >>"$(dirname "$0")/calls"
case "$2" in
  pytest) echo "3 passed in 1s" ;;
  broadbeam_kernels) exit 3 ;;
  *) exit 1 ;;
esac
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return path


def measured(python: Path) -> tuple[int, list[str]]:
    """The script's exit status, and the calls of Python that it made."""
    calls = python.with_name("calls")
    calls.unlink(missing_ok=True)
    done = subprocess.run(
        [str(SCRIPT), str(python.with_name("out")), "8"],
        env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert "3 passed in 1s" in done.stdout
    return done.returncode, calls.read_text().splitlines()


def test_tests_run_once_and_timings_until_no_case_is_left(python: Path) -> None:
    status, calls = measured(python)
    assert (status, len(calls)) == (3, 4)
    assert "--ignore tests/kernels/test_huge.py" in calls[1]
    assert calls[2].endswith("-m gpu tests/kernels/test_huge.py")
    status, (bench,) = measured(python)
    assert status == 3
    assert f"--run {python.with_name('out')}/rows.jsonl" in bench
