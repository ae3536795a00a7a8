"""Launch parameters: chosen by table for every device, known or not, and never by trying. No GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from broadbeam_kernels import tuning
from broadbeam_kernels.bench import tune

TABLES = sorted(path.stem for path in tuning.TUNED.glob("*.json"))
EVERYTHING = {
    "rows": 300,
    "n": 4096,
    "k": 7168,
    "block": 128,
    "each": 300,
    "bytes": 1,
    "tokens": 300,
    "nope": 512,
    "columns": 7168,
    "maxima": 0,
    "swizzled": 0,
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[torch.device]:
    name, capability = request.param
    remembered = (tuning.device_name, tuning.architecture)
    for function in remembered:
        function.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: capability)
    yield torch.device("cuda", 0)
    for function in remembered:
        function.cache_clear()


H100, H200 = ("NVIDIA H100 80GB HBM3", (9, 0)), ("NVIDIA H200", (9, 0))
A100, B200 = ("NVIDIA A100-SXM4-80GB", (8, 0)), ("NVIDIA B200", (10, 0))


@pytest.mark.parametrize(
    ("device", "groups"),
    [(H100, 16), (H200, 16), (A100, 32), (B200, 32)],
    ids=["an H100 by its own table", "an H200 as a Hopper", "an Ampere by default", "a Blackwell by default"],
    indirect=["device"],
)
def test_a_device_takes_its_own_table_then_its_architectures_then_the_default(
    device: torch.device, groups: int
) -> None:
    assert tuning.config("fp8_quantize_rows", device)["GROUPS"] == groups


@pytest.mark.parametrize("device", [H100, H200, A100], ids=str, indirect=True)
def test_an_operation_without_a_rule_for_the_shape_takes_the_default(device: torch.device) -> None:
    assert tuning.config("fp8_gemm", device, rows=64, n=136, k=128)["KIND"] == "decode"
    assert tuning.config("rope_quantize", device, tokens=1, nope=512)["HEADS"] == 4


@pytest.mark.parametrize("operation", [name for name in tuning._table("default") if name != "like"])
def test_the_default_has_a_rule_for_every_operation_and_any_shape(operation: str) -> None:
    for rows in (0, 1, 17, 300, 10**9):
        facts = {**EVERYTHING, "rows": rows, "block": min(rows, 256), "each": rows, "maxima": rows % 2}
        assert tuning.config(operation, torch.device("cpu"), **facts)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_names_operations_and_parameters_that_exist(name: str) -> None:
    default = json.loads((tuning.TUNED / "default.json").read_text())
    table: dict[str, Any] = json.loads((tuning.TUNED / f"{name}.json").read_text())
    assert table.pop("like", "default") in TABLES
    assert set(table) <= set(default)
    for operation, rules in table.items():
        launches = (*default[operation], *tune.CANDIDATES.get(operation, ()))
        known = {key for launch in launches for key in launch}
        assert all(set(rule) - {"when"} <= known for rule in rules), operation
        assert all(set(rule.get("when", {})) <= set(EVERYTHING) for rule in rules), operation
