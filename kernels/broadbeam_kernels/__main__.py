"""Time the kernels against their floors and peers, record it, find a device's launch parameters."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from .bench import matrix, memory, packed, portable, report, tune
from .bench.case import Case, Row, measure_ceilings, time_case, versions
from .bench.run import Outcome, measure
from .testing import Timer
from .tuning import TUNED, device_name

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
DONE, FAILED, REFUSED, UNFINISHED = range(4)

BENCH = f"""\
Times every operation at its bars' sizes on the CUDA device at hand, caches flushed before each call.

operations:
{chr(10).join(f"  {name:17s} {(group.__doc__ or '').splitlines()[0]}" for name, group in GROUPS.items())}

a line says, in this order:
  operation, shape
  us               median of 7 to 100 calls
  MB, GB/s         bytes the operation must move at least, and that over the time
  GFLOP, TFLOP/s   the same of its arithmetic
  89% of memory    its floor over the time. The floor is the larger of bytes over the rate of a 1 GiB copy
                   (memory) and arithmetic over that of an 8192^3 product (fp8, bf16), measured in this run
  deep_gemm 1.04x  a peer's time over ours: above 1 we are faster; or what a peer said that could not run

Peers are used where they can be imported: torch, DeepGEMM (sgl-deep-gemm), FlashInfer (flashinfer-python).
Rows go to --baselines by operation, shape and device, so that devices keep apart; medians more than 10 %
above the accepted ones of the same device are warned of. Table and picture go to --page.
"""
TUNE = """\
Times the candidates of every launch parameter on the cases of `bench`, and writes what was faster into the
table of the device at hand, which it is launched by from then on. Run the tests marked gpu afterwards.
"""
EPILOG = """\
exit status:
  0  every case was measured
  1  a case of ours failed; it is named at the end, the others were measured
  2  nothing could be measured
  3  time was up: the same command again goes on, with --run from where it was

examples:
  python -m broadbeam_kernels bench quantize fp8_gemm
  until python -m broadbeam_kernels bench --minutes 9 --run rows.jsonl; do [ $? = 3 ] || break; done
  python -m broadbeam_kernels report rows.jsonl     # rows of another machine, into this checkout
  python -m broadbeam_kernels tune quantize         # a new device's launch parameters
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m broadbeam_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    form = argparse.RawDescriptionHelpFormatter
    bench = commands.add_parser(
        "bench", help="measure, compare, record", description=BENCH, epilog=EPILOG, formatter_class=form
    )
    tuner = commands.add_parser(
        "tune", help="find launch parameters for this device", description=TUNE, formatter_class=form
    )
    for command in (bench, tuner):
        command.add_argument("operations", nargs="*", metavar="OPERATION", help="which to time (all of them)")
        command.add_argument(
            "--budget-ms", type=float, default=20.0, metavar="MS", help="device time per measurement (20)"
        )
        command.add_argument(
            "--minutes", type=float, default=float("inf"), metavar="N", help="begin no case after N minutes"
        )
    tuner.add_argument(
        "--table", type=Path, metavar="FILE", help="where rules go (the device's table beside the kernels)"
    )
    bench.add_argument(
        "--run", type=Path, metavar="FILE",
        help="keep rows in FILE, pass over those it has of this device and these versions, "
        "and record them when every case was measured",
    )  # fmt: skip
    redraw = commands.add_parser("report", help="record rows of other runs, redraw table and picture")
    redraw.add_argument("rows", nargs="*", type=Path, metavar="FILE", help="what `bench --run` kept")
    for command in (bench, redraw):
        command.add_argument(
            "--baselines", type=Path, default=ROOT / "kernels" / "baselines.jsonl", metavar="FILE",
            help="accepted rows, one JSON object a line (%(default)s)",
        )  # fmt: skip
        command.add_argument(
            "--page", type=Path, default=ROOT / "docs" / "kernels.md", metavar="FILE",
            help="Markdown page with the table, the picture beside it (%(default)s)",
        )  # fmt: skip
    return parser


def _record(baselines: Path, page: Path, accepted: list[Row], rows: list[Row]) -> None:
    """Merge, warn, redraw."""
    merged = report.merge(accepted, rows)
    report.write(baselines, merged)
    report.place_table(page, report.table(merged))
    if not report.draw(page.with_name("kernels-roofline.png"), merged):
        print("no picture: matplotlib is not installed, or there are no rows", file=sys.stderr)
    for sentence in report.regressions(accepted, rows):
        print(f"warning: {sentence}", file=sys.stderr)
    for sentence in report.summary(rows):
        print(sentence)


def _refusal(arguments: argparse.Namespace) -> str | None:
    """Why nothing can be measured."""
    unknown = sorted(set(arguments.operations) - set(GROUPS))
    for option in ("run", "table"):
        path = getattr(arguments, option, None)
        if path and not path.parent.is_dir():
            return f"--{option} {path}: there is no folder {path.parent}"
    if unknown:
        return f"no operation {', '.join(unknown)}; there are {', '.join(GROUPS)}"
    return None if torch.cuda.is_available() else "the kernels' benchmarks need a CUDA device"


def _measure(arguments: argparse.Namespace, keep: Callable[[list[Row]], None]) -> Outcome:
    deadline = time.monotonic() + 60 * arguments.minutes
    timer = Timer(arguments.budget_ms)
    ceilings = measure_ceilings(timer)
    here = {"device": torch.cuda.get_device_name(), "versions": versions()}
    print(f"{here['device']}: {ceilings}", flush=True)

    def timed(case: Case) -> Row:
        row = {**time_case(case, timer, ceilings), **here, "ceilings": asdict(ceilings)}
        print(report.line(row), flush=True)
        return row

    return measure(
        {name: GROUPS[name] for name in arguments.operations or GROUPS},
        timed,
        earlier=report.read_run(arguments.run, here) if arguments.run else (),
        keep=keep,
        out_of_time=lambda: time.monotonic() >= deadline,
    )


def _bench(arguments: argparse.Namespace) -> int:
    refusal = _refusal(arguments)
    if refusal is not None:
        print(refusal, file=sys.stderr)
        return REFUSED
    accepted = report.read(arguments.baselines)
    kept = arguments.run or arguments.baselines
    before = report.read(kept)  # other devices' rows among them, which stay

    def keep(rows: list[Row]) -> None:
        report.write(kept, report.merge(before, rows))

    outcome = _measure(arguments, keep)
    if outcome.finished or not arguments.run:
        _record(arguments.baselines, arguments.page, accepted, outcome.rows)
    for failure in outcome.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if not outcome.finished:
        print(f"time is up: {len(outcome.rows)} rows measured, more to come", file=sys.stderr)
        return UNFINISHED
    return FAILED if outcome.failures else DONE


def _tune(arguments: argparse.Namespace) -> int:
    refusal = _refusal(arguments)
    folder = arguments.table.parent if arguments.table else TUNED
    if refusal is None and not os.access(folder, os.W_OK):
        refusal = f"{folder} cannot be written: name a file with --table"
    if refusal is not None:
        print(refusal, file=sys.stderr)
        return REFUSED
    deadline = time.monotonic() + 60 * arguments.minutes
    device = torch.device("cuda", torch.cuda.current_device())
    path = arguments.table or TUNED / f"{device_name(device.index)}.json"
    outcome = tune.tune(
        {name: GROUPS[name] for name in arguments.operations or GROUPS},
        Timer(arguments.budget_ms),
        lambda sentence: print(sentence, flush=True),
        out_of_time=lambda: time.monotonic() >= deadline,
    )
    for trial in outcome.trials:
        launch, gain = trial.best()
        print(f"{trial.operation} {trial.rule.get('when', '')}: {gain:.3f}x with {launch}")
    tune.write(path, tune.table(outcome.trials, device))
    print(f"written to {path}")
    if not outcome.finished:
        return UNFINISHED
    return FAILED if outcome.failures else DONE


def main(argv: list[str] | None = None) -> int:
    """See `bench --help` for the exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "bench":
        return _bench(arguments)
    if arguments.command == "tune":
        return _tune(arguments)
    rows = report.merge((), (row for path in arguments.rows for row in report.read(path)))
    _record(arguments.baselines, arguments.page, report.read(arguments.baselines), rows)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
