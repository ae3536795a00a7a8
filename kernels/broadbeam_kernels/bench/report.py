"""Rows of measurements: read, compare, written as JSON lines, as a table and as a roofline picture."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from .case import Row

WORSE = 1.10  # a median this much above the accepted one is warned of
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
# Peers that do less work than the operation, or are our own other form: shown, not counted as the best other.
NOT_RIVALS = ("torch tensorwise", "contiguous", "our bf16")


def key(row: Row) -> tuple[str, str, str]:
    """What makes two rows the same measurement."""
    return row["operation"], row["shape"], row["device"]


def read(path: Path) -> list[Row]:
    """Rows of a JSON-lines file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def merge(accepted: Iterable[Row], measured: Iterable[Row]) -> list[Row]:
    """Accepted rows with measured ones in place of their predecessors, sorted."""
    rows = {key(row): row for row in (*accepted, *measured)}
    return [rows[k] for k in sorted(rows)]


def write(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line, keys sorted."""
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def regressions(accepted: Iterable[Row], measured: Iterable[Row]) -> list[str]:
    """A sentence for each measurement more than 10 % slower than the accepted one."""
    before = {key(row): row["median_us"] for row in accepted}
    return [
        f"{row['operation']} {row['shape']}: {row['median_us']:.1f} us, accepted {before[key(row)]:.1f} us"
        for row in measured
        if key(row) in before and row["median_us"] > WORSE * before[key(row)]
    ]


def best_ratio(row: Row) -> float | None:
    """The fastest rival's time over ours, or None where no rival ran."""
    ratios = [
        peer["ratio"] for name, peer in row["peers"].items() if "ratio" in peer and name not in NOT_RIVALS
    ]
    return min(ratios) if ratios else None


def geometric_mean(values: Sequence[float]) -> float:
    """NaN for none."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def _peer(name: str, peer: Row) -> str:
    if "error" in peer:
        return f"{name}: {peer['error'][:60]}".replace("|", "/")
    return f"{name} {peer['ratio']:.2f}x"


def line(row: Row) -> str:
    """One measurement in one line of text."""
    others = ", ".join(_peer(name, peer) for name, peer in row["peers"].items())
    return (
        f"{row['operation']:17s} {row['shape']:42s} {row['median_us']:9.1f} us {row['gb_s']:7.0f} GB/s "
        f"{row['tflop_s']:6.0f} TFLOP/s {row['fraction']:5.0%} of {row['bound']:6s} {others}"
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown: every measurement of each device."""
    parts = []
    for device in sorted({row["device"] for row in rows}):
        mine = [row for row in rows if row["device"] == device]
        ceilings = mine[-1]["ceilings"]
        parts.append(
            f"{device}: copy {ceilings['copy_gb_s']:.0f} GB/s, FP8 {ceilings['fp8_tflop_s']:.0f} and bf16 "
            f"{ceilings['bf16_tflop_s']:.0f} TFLOP/s (8192^3, one scale per tensor), in the same run.\n\n"
            "| operation | shape | us | GB/s | TFLOP/s | of its floor | floor set by | peers' time / ours |\n"
            "|---|---|---|---|---|---|---|---|"
        )
        for row in mine:
            others = ", ".join(_peer(name, peer) for name, peer in row["peers"].items())
            parts[-1] += (
                f"\n| {row['operation']} | {row['shape']} | {row['median_us']:.1f} | {row['gb_s']:.0f} "
                f"| {row['tflop_s']:.0f} | {row['fraction']:.0%} | {row['bound']} | {others} |"
            )
    return "\n\n".join(parts)


def place_table(path: Path, text: str) -> None:
    """Put `text` between the page's markers; a page without them gets it at its end."""
    page = path.read_text() if path.exists() else ""
    if BEGIN not in page:
        page = f"{page}\n{BEGIN}\n{END}\n"
    head, rest = page.split(BEGIN, 1)
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")


def draw(path: Path, rows: Sequence[Row]) -> bool:
    """Roofline of the last device's rows as a PNG; False where matplotlib is missing."""
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return False
    device = rows[-1]["device"]
    mine = [row for row in rows if row["device"] == device]
    ceilings = mine[-1]["ceilings"]
    copy = ceilings["copy_gb_s"]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 5.5), gridspec_kw={"width_ratios": [3, 2]}, layout="constrained"
    )
    intensity = [2.0**i for i in range(-2, 14)]
    for unit, style in (("fp8", "-"), ("bf16", "--")):
        peak = ceilings[f"{unit}_tflop_s"]
        roof = [min(peak, copy * x / 1e3) for x in intensity]
        left.plot(intensity, roof, f"k{style}", linewidth=1, label=f"{unit} roof, {peak:.0f} TFLOP/s")
    for operation in sorted({row["operation"] for row in mine if row["flops"]}):
        points = [row for row in mine if row["operation"] == operation]
        x = [row["flops"] / row["bytes"] for row in points]
        left.scatter(x, [row["tflop_s"] for row in points], s=18, label=operation)
    left.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title=device)
    left.legend(fontsize=8)
    moving = [row for row in mine if not row["flops"]]
    names = [f"{row['operation']} {row['shape']}" for row in moving]
    right.barh(names, [100 * row["fraction"] for row in moving], color="tab:blue")
    right.axvline(85, color="k", linewidth=0.8, linestyle=":")
    right.set(xlim=(0, 105), xlabel=f"% of the copy's {copy:.0f} GB/s")
    right.tick_params(axis="y", labelsize=6)
    right.invert_yaxis()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
