"""What the Makefile hands on; the commands that it runs have tests of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
QUESTIONS = [
    pytest.param('It\'s "quoted" $HOME `id`', id="quotes"),
    pytest.param("costs $5, $(HOME) $$ # all", id="what make would expand"),
    pytest.param("$(shell touch stolen)$(touch stolen)`touch stolen`", id="commands"),
    pytest.param("two\nlines \\", id="lines"),
    pytest.param("--help", id="an option"),
    pytest.param("", id="nothing"),
]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """As much of a prepared clone as `make demo` looks at; its `broadbeam` writes down what it was told."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    broadbeam = tmp_path / ".venv" / "bin" / "broadbeam"
    broadbeam.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        'json.dump({"arguments": sys.argv[1:], "keeps": not sys.dont_write_bytecode}, open("told", "w"))\n'
    )
    broadbeam.chmod(0o755)
    for name in ("requirements/dev.lock", "pyproject.toml", ".venv/.stamp-"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("given", ["as an argument", "in the environment"])
def test_a_question_is_asked_as_it_was_typed(clone: Path, question: str, given: str) -> None:
    as_argument = given == "as an argument"
    told = demo(clone, f"PROMPT={question}") if as_argument else demo(clone, PROMPT=question)
    assert told["arguments"] == ["demo", "examples/laptop.yaml", f"--prompt={question}"]
    assert not (clone / "stolen").exists()


def test_what_python_has_compiled_is_kept_whatever_the_environment_says(clone: Path) -> None:
    assert demo(clone, PYTHONDONTWRITEBYTECODE="1")["keeps"]


def demo(clone: Path, *words: str, **environment: str) -> dict[str, Any]:
    """What `make demo` tells `broadbeam`."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    command = ["make", "-s", "-f", str(MAKEFILE), "demo", *words]
    subprocess.run(command, cwd=clone, env={**inherited, "TORCH_BACKEND": "", **environment}, check=True)
    told: dict[str, Any] = json.loads((clone / "told").read_text())
    return told
