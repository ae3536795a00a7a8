"""Recorded measurements: merged by what they measure, compared, and placed on a page. No GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broadbeam_kernels.bench import report
from broadbeam_kernels.bench.case import Case, Ceilings


def row(shape: str, us: float, device: str = "H100", **peers: dict[str, Any]) -> dict[str, Any]:
    return {
        "operation": "fp8_gemm",
        "shape": shape,
        "device": device,
        "median_us": us,
        "gb_s": 1.0,
        "tflop_s": 1.0,
        "fraction": 0.5,
        "bound": "fp8",
        "peers": peers,
        "ceilings": {"copy_gb_s": 3000.0, "fp8_tflop_s": 1500.0, "bf16_tflop_s": 800.0},
    }


def test_a_measurement_replaces_only_its_own_predecessor(tmp_path: Path) -> None:
    accepted = [row("a", 1.0), row("a", 2.0, device="H200"), row("b", 3.0)]
    path = tmp_path / "baselines.jsonl"
    report.write(path, report.merge(accepted, [row("a", 9.0)]))
    found = {(r["shape"], r["device"]): r["median_us"] for r in report.read(path)}
    assert found == {("a", "H100"): 9.0, ("a", "H200"): 2.0, ("b", "H100"): 3.0}


@pytest.mark.parametrize(
    ("us", "warnings"), [(109.0, 0), (111.0, 1)], ids=["within ten percent", "past ten percent"]
)
def test_only_medians_past_ten_percent_are_warned_of(us: float, warnings: int) -> None:
    assert len(report.regressions([row("a", 100.0)], [row("a", us), row("new", 500.0)])) == warnings


def test_a_peer_that_failed_is_named_and_never_the_best() -> None:
    measured = row("a", 1.0, deep_gemm={"error": "ImportError: no | wheel"}, torch={"ratio": 1.5})
    assert report.best_ratio(measured) == 1.5
    assert "deep_gemm: ImportError: no / wheel" in report.table([measured])


def test_a_ceiling_of_lighter_work_is_no_rival() -> None:
    assert report.best_ratio(row("a", 1.0, **{"torch tensorwise": {"ratio": 0.5}})) is None


def test_the_table_is_placed_between_the_pages_markers(tmp_path: Path) -> None:
    page = tmp_path / "kernels.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.place_table(page, "new")
    assert page.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"


@pytest.mark.parametrize(
    ("moved", "flops", "bound"), [(3_000_000, 1, "memory"), (1, 1_500_000_000, "fp8")], ids=str
)
def test_the_larger_of_two_times_is_the_floor(moved: int, flops: int, bound: str) -> None:
    seconds, what = Ceilings(3000.0, 1500.0, 800.0).floor_s(Case("op", "shape", lambda: None, moved, flops))
    assert what == bound
    assert seconds == pytest.approx(1e-6)
