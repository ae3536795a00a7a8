from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "charts" / "broadbeam"


def built_helm() -> Path:
    """The helm that `make controlplane` builds, built or not."""
    path = REPOSITORY / "e2e" / "controlplane" / "build.py"
    spec = importlib.util.spec_from_file_location("controlplane_build", path)
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = build
    spec.loader.exec_module(build)
    helm: Path = build.installed().helm
    return helm


@pytest.fixture(scope="session")
def helm() -> Callable[..., subprocess.CompletedProcess[str]]:
    binary = built_helm()
    if not binary.exists():
        pytest.skip("helm is not built: make controlplane")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([binary, *arguments], capture_output=True, text=True)

    return run


@pytest.fixture
def render(
    helm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> Callable[..., list[dict[str, Any]]]:
    """The objects of release `bb` in namespace `system` with these values."""

    def objects(values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(values or {}))
        answer = helm("template", "bb", str(CHART), "--namespace=system", f"--values={file}")
        assert answer.returncode == 0, answer.stderr
        return [document for document in yaml.safe_load_all(answer.stdout) if document]

    return objects
