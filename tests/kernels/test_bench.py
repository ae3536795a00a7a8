"""A run of the benchmarks, in parts, with cases that fail. No GPU: references run, a clock of ours times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from broadbeam_kernels import __main__ as command
from broadbeam_kernels.bench.case import Case, Ceilings, ready, time_case
from broadbeam_kernels.bench.run import measure
from broadbeam_kernels.formats import FP8_BLOCK128, MXFP4
from broadbeam_kernels.quantize import quantize
from broadbeam_kernels.testing import gaussian, nbytes

CEILINGS = Ceilings(copy_gb_s=3000.0, fp8_tflop_s=1500.0, bf16_tflop_s=800.0)


class Clock:
    """Stands where the device's timer stands: a call runs once, and took what we say."""

    def __init__(self, budget_ms: float = 20.0) -> None:
        self.ms = 0.1

    def median_ms(self, fn: Callable[[], object]) -> float:
        fn()
        return self.ms


def quantizers() -> Iterator[Case]:
    x = gaussian(4, 256, device="cpu")
    for name, fmt in (("fp8", FP8_BLOCK128), ("mxfp4", MXFP4)):
        moved = nbytes(x) + quantize(x, fmt).nbytes
        peers = {"slower": ready(lambda: None), "absent": partial(__import__, "no_such_library")}
        yield Case("quantize", name, partial(quantize, x, fmt), moved, peers=peers)


def broken() -> Iterator[Case]:
    yield Case("broken", "that cannot run", lambda: 1 / 0, 1)
    yield Case("broken", "that runs", lambda: None, 1, flops=2)
    raise RuntimeError("out of memory\nand more")


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["shape"] for row in rows]


def timed(case: Case) -> dict[str, Any]:
    return time_case(case, Clock(), CEILINGS)  # type: ignore[arg-type]


def test_rows_are_kept_one_by_one() -> None:
    kept: list[list[str]] = []
    measure({"quantize": quantizers}, timed, keep=lambda rows: kept.append(names(rows)))
    assert kept == [["fp8"], ["fp8", "mxfp4"]]


def test_what_fails_is_named_and_what_comes_after_it_is_measured() -> None:
    outcome = measure({"broken": broken, "quantize": quantizers}, timed)
    assert names(outcome.rows) == ["that runs", "fp8", "mxfp4"]
    assert outcome.failures == [
        "broken that cannot run: ZeroDivisionError: division by zero",
        "broken: RuntimeError: out of memory",
    ]


def test_a_run_goes_on_where_it_was_cut_short() -> None:
    ticks = iter([False, True])
    first = measure({"quantize": quantizers}, timed, out_of_time=lambda: next(ticks))
    assert (names(first.rows), first.finished) == (["fp8"], False)
    second = measure({"quantize": quantizers}, timed, earlier=first.rows)
    assert (names(second.rows), second.finished) == (["fp8", "mxfp4"], True)
    assert second.rows[0] is first.rows[0]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command, on a device that is not there, with two groups of cases."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(command, "GROUPS", {"quantize": quantizers, "broken": broken})
    monkeypatch.setattr(command, "Timer", Clock)
    monkeypatch.setattr(command, "measure_ceilings", lambda _timer: CEILINGS)
    monkeypatch.setattr(command, "versions", lambda: {"torch": "2"})
    files = ["--baselines", str(tmp_path / "baselines.jsonl"), "--page", str(tmp_path / "kernels.md")]
    return lambda name, *arguments: command.main([name, *map(str, arguments), *files])


def recorded(path: Path) -> dict[tuple[str, str], float]:
    rows = map(json.loads, path.read_text().splitlines())
    return {(row["device"], row["shape"]): row["median_us"] for row in rows}


def test_a_bench_records_its_device_beside_others(bench: Callable[..., int], tmp_path: Path) -> None:
    baselines, page = tmp_path / "baselines.jsonl", tmp_path / "kernels.md"
    assert bench("bench", "quantize") == 0
    row = json.loads(baselines.read_text().splitlines()[0])
    baselines.write_text(json.dumps({**row, "device": "NVIDIA H100", "median_us": 1.0}) + "\n")
    assert bench("bench", "quantize") == 0
    assert recorded(baselines) == {
        ("NVIDIA H100", "fp8"): 1.0,
        ("NVIDIA H200", "fp8"): 100.0,
        ("NVIDIA H200", "mxfp4"): 100.0,
    }
    assert page.read_text().count("copy 3,000 GB/s") == 2
    assert "absent: ModuleNotFoundError" in page.read_text()


def test_a_bench_warns_of_its_own_device_alone(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baselines = tmp_path / "baselines.jsonl"
    bench("bench", "quantize")
    rows = [json.loads(line) for line in baselines.read_text().splitlines()]
    rows[0]["device"], rows[0]["median_us"] = "NVIDIA H100", 50.0
    rows[1]["median_us"] = 50.0
    baselines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert bench("bench", "quantize") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: quantize mxfp4 NVIDIA H200: 100.0 us, accepted 50.0 us"]


def test_a_printed_line_has_time_bytes_flops_fractions_and_peers(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    bench("bench", "quantize")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("quantize"))
    for part in (
        "fp8",
        "100.0 us",
        "0.0 MB",
        "GB/s",
        "GFLOP",
        "TFLOP/s",
        "of memory",
        "slower 1.00x",
        "absent: ",
    ):
        assert part in line


def test_a_run_is_recorded_when_all_of_it_is_measured(bench: Callable[..., int], tmp_path: Path) -> None:
    run, baselines = tmp_path / "rows.jsonl", tmp_path / "baselines.jsonl"
    assert bench("bench", "quantize", "--minutes", "0", "--run", run) == 3
    assert bench("bench", "quantize", "--run", run) == 0
    assert recorded(run) == recorded(baselines)
    run.write_text(run.read_text().replace("100.0", "90.0"))
    assert bench("bench", "quantize", "--run", run) == 0  # nothing is left to measure
    assert set(recorded(baselines).values()) == {90.0}


def test_a_run_of_another_device_is_not_gone_on_with_and_not_lost(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "rows.jsonl"
    assert bench("bench", "quantize", "--run", run) == 0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert bench("bench", "quantize", "--run", run) == 0
    for path in (run, tmp_path / "baselines.jsonl"):
        assert {device for device, _ in recorded(path)} == {"NVIDIA H100", "NVIDIA H200"}


def test_rows_of_another_machine_are_recorded_by_report(bench: Callable[..., int], tmp_path: Path) -> None:
    run, baselines = tmp_path / "rows.jsonl", tmp_path / "baselines.jsonl"
    bench("bench", "quantize", "--run", run)
    baselines.unlink()
    assert bench("report", run) == 0
    assert recorded(baselines) == recorded(run)


def test_a_failed_case_is_named_and_the_status_says_so(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("bench") == 1
    assert "failed: broken that cannot run: ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fp9"], "no operation fp9; there are quantize, broken"),
        (["--run", "/nowhere/rows.jsonl"], "there is no folder /nowhere"),
    ],
    ids=["an operation", "a folder"],
)
def test_what_is_not_there_is_refused(
    arguments: list[str], words: str, bench: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("bench", *arguments) == 2
    assert words in capsys.readouterr().err


def test_a_report_of_nothing_draws_nothing(bench: Callable[..., int], tmp_path: Path) -> None:
    assert bench("report") == 0
    assert not (tmp_path / "kernels-roofline.png").exists()


def test_without_a_gpu_the_bench_says_so(
    bench: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("bench") == 2
    assert "need a CUDA device" in capsys.readouterr().err


def test_the_help_names_every_operation_and_what_a_line_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["bench", "--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in command.GROUPS)
    assert all(
        word in text for word in ("GFLOP", "floor", "exit status", "examples", "above 1 we are faster")
    )
