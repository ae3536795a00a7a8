"""`python -m broadbeam_kernels bench [OPERATION…]`: time the kernels against their floors and peers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from .bench import matrix, memory, packed, portable, report
from .bench.case import Case, Row, measure_ceilings, time_case, versions
from .testing import Timer

ROOT = Path(__file__).resolve().parents[2]
GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "quantize": memory.quantizers,
    "silu_mul_quant": memory.silu,
    "concat_mla_k": memory.concat,
    "rope_quantize": memory.rotary,
    "add_rms_norm": memory.norms,
    "layout": memory.layouts,
    "fp8_gemm": matrix.dense,
    "grouped_fp8_gemm": matrix.grouped_fp8,
    "grouped_gemm": matrix.grouped_bf16,
    "fp4_gemm": packed.plain,
    "grouped_fp4_gemm": packed.grouped,
    "masked_gemm": portable.masked_bf16,
    "masked_fp4_gemm": portable.masked_fp4,
    "scaled_gemm": portable.block_scaled,
    "portable_gemm": portable.portable_fp8,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m broadbeam_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (("bench", "measure, compare, record"), ("report", "redraw from the recorded rows")):
        command = commands.add_parser(name, help=words)
        command.add_argument("--baselines", type=Path, default=ROOT / "kernels" / "baselines.jsonl")
        command.add_argument("--page", type=Path, default=ROOT / "docs" / "kernels.md")
        if name == "bench":
            command.add_argument("operations", nargs="*", metavar="OPERATION", help=", ".join(GROUPS))
            command.add_argument("--budget-ms", type=float, default=20.0, help="device time per measurement")
    return parser.parse_args()


def _measure(operations: list[str], budget_ms: float) -> Iterator[list[Row]]:
    """The rows of one operation after another."""
    timer = Timer(budget_ms)
    ceilings = measure_ceilings(timer)
    facts = {"device": torch.cuda.get_device_name(), "versions": versions(), "ceilings": asdict(ceilings)}
    print(f"{facts['device']}: {ceilings}", flush=True)
    for name in operations:
        rows = []
        for case in GROUPS[name]():
            rows.append({**time_case(case, timer, ceilings), **facts})
            print(report.line(rows[-1]), flush=True)
        torch.cuda.empty_cache()
        yield rows


def _record(baselines: Path, page: Path, rows: list[Row]) -> None:
    report.write(baselines, rows)
    report.place_table(page, report.table(rows))
    if not report.draw(page.with_name("kernels-roofline.png"), rows):
        print("no picture: matplotlib is not installed", file=sys.stderr)


def main() -> int:
    """Exit status: 0, or 2 where nothing could be measured."""
    arguments = _arguments()
    accepted = report.read(arguments.baselines)
    if arguments.command == "report":
        _record(arguments.baselines, arguments.page, accepted)
        return 0
    unknown = set(arguments.operations) - set(GROUPS)
    if unknown or not torch.cuda.is_available():
        reason = (
            f"no operation {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}"
            if unknown
            else "the kernels' benchmarks need a CUDA device"
        )
        print(reason, file=sys.stderr)
        return 2
    measured: list[Row] = []
    for rows in _measure(arguments.operations or list(GROUPS), arguments.budget_ms):
        measured += rows
        report.write(arguments.baselines, report.merge(accepted, measured))  # what is measured is kept
    for sentence in report.regressions(accepted, measured):
        print(f"warning: {sentence}", file=sys.stderr)
    ratios = [r for row in measured if row["operation"] == "fp8_gemm" if (r := report.best_ratio(row))]
    if ratios:
        print(f"fp8_gemm: geometric mean over shapes {report.geometric_mean(ratios):.3f} of the best peer")
    _record(arguments.baselines, arguments.page, report.merge(accepted, measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
