"""Rows of measurements: read, compare, written as JSON lines, as a table and as a roofline picture."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .case import Row

WORSE = 1.10  # a median this much above the accepted one is warned of
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
# Peers that do less work than the operation, or are our own other form: shown, not counted as the best other.
NOT_RIVALS = ("torch tensorwise", "contiguous", "our bf16", "own path", "bf16 activations")


def key(row: Row) -> tuple[str, str, str]:
    """What makes two rows the same measurement."""
    return row["operation"], row["shape"], row["device"]


def read(path: Path) -> list[Row]:
    """Rows of a JSON-lines file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def read_run(path: Path, here: Row) -> list[Row]:
    """Rows that an earlier part of a run kept in `path`, if it ran on this device with these versions."""
    return [row for row in read(path) if all(row[name] == value for name, value in here.items())]


def merge(accepted: Iterable[Row], measured: Iterable[Row]) -> list[Row]:
    """Accepted rows with measured ones in place of their predecessors, sorted."""
    rows = {key(row): row for row in (*accepted, *measured)}
    return [rows[k] for k in sorted(rows)]


def write(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line, keys sorted; the file is whole whenever the process is stopped."""
    written = path.with_name(f".{path.name}.new")
    written.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    written.replace(path)


def regressions(accepted: Iterable[Row], measured: Iterable[Row]) -> list[str]:
    """A sentence for each measurement more than 10 % slower than the accepted one."""
    before = {key(row): row["median_us"] for row in accepted}
    return [
        f"{' '.join(key(row))}: {row['median_us']:.1f} us, accepted {before[key(row)]:.1f} us"
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


def summary(rows: Iterable[Row]) -> list[str]:
    """For each device, what FP8 products come to over all their shapes."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratio = best_ratio(row) if row["operation"] == "fp8_gemm" else None
        if ratio is not None:
            ratios.setdefault(row["device"], []).append(ratio)
    return [
        f"fp8_gemm on {device}: the best peer takes {geometric_mean(found):.3f} of our time "
        f"(geometric mean over {len(found)} shapes)"
        for device, found in ratios.items()
    ]


def _peer(name: str, peer: Row) -> str:
    if "error" in peer:
        return f"{name}: {peer['error'][:60]}".replace("|", "/")
    return f"{name} {peer['ratio']:.2f}x"


def line(row: Row) -> str:
    """One measurement in one line of text, in the columns that `bench --help` explains."""
    others = ", ".join(_peer(name, peer) for name, peer in row["peers"].items())
    return (
        f"{row['operation']:17s} {row['shape']:42s} {row['median_us']:9.1f} us "
        f"{row['bytes'] / 1e6:8.1f} MB {row['gb_s']:6.0f} GB/s "
        f"{row['flops'] / 1e9:8.1f} GFLOP {row['tflop_s']:5.0f} TFLOP/s "
        f"{row['fraction']:5.0%} of {row['bound']:6s} {others}"
    )


def _spread(rows: Sequence[Row], ceiling: str) -> str:
    """A ceiling, or its least and its greatest where rows come from several runs."""
    low, high = (f"{f(row['ceilings'][ceiling] for row in rows):,.0f}" for f in (min, max))
    return low if low == high else f"{low} to {high}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: every measurement of each device."""
    parts = []
    for device in sorted({row["device"] for row in rows}):
        mine = [row for row in rows if row["device"] == device]
        parts.append(
            f"{device}: copy {_spread(mine, 'copy_gb_s')} GB/s, FP8 {_spread(mine, 'fp8_tflop_s')} and bf16 "
            f"{_spread(mine, 'bf16_tflop_s')} TFLOP/s (8192^3, one scale per tensor), each row's in its own "
            "run.\n\n"
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


def _draw_roofline(axes: Any, device: str, rows: Sequence[Row]) -> None:
    ceilings = rows[-1]["ceilings"]
    intensity = [2.0**i for i in range(-2, 14)]
    for unit, style in (("fp8", "-"), ("bf16", "--")):
        peak = ceilings[f"{unit}_tflop_s"]
        roof = [min(peak, ceilings["copy_gb_s"] * x / 1e3) for x in intensity]
        axes.plot(intensity, roof, f"k{style}", linewidth=1, label=f"{unit} roof, {peak:.0f} TFLOP/s")
    for operation in sorted({row["operation"] for row in rows if row["flops"]}):
        points = [row for row in rows if row["operation"] == operation]
        x = [row["flops"] / row["bytes"] for row in points]
        axes.scatter(x, [row["tflop_s"] for row in points], s=18, label=operation)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title=device)
    axes.legend(fontsize=8)


def _draw_bandwidth(axes: Any, rows: Sequence[Row]) -> None:
    """The operations that only move bytes."""
    moving = [row for row in rows if not row["flops"]]
    names = [f"{row['operation']} {row['shape']}" for row in moving]
    axes.barh(names, [100 * row["fraction"] for row in moving], color="tab:blue")
    axes.axvline(85, color="k", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 105), xlabel=f"% of the copy's {rows[-1]['ceilings']['copy_gb_s']:.0f} GB/s")
    axes.tick_params(axis="y", labelsize=6)
    axes.invert_yaxis()


def draw(path: Path, rows: Sequence[Row]) -> bool:
    """Rooflines as one PNG, two panels a device; False without matplotlib, or without rows."""
    devices = sorted({row["device"] for row in rows})
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return False
    if not devices:
        return False
    bars = max(sum(not row["flops"] for row in rows if row["device"] == device) for device in devices)
    figure, panels = pyplot.subplots(
        len(devices),
        2,
        figsize=(13, max(5.5, 0.15 * bars) * len(devices)),
        gridspec_kw={"width_ratios": [3, 2]},
        layout="constrained",
        squeeze=False,
    )
    for (left, right), device in zip(panels, devices, strict=True):
        mine = [row for row in rows if row["device"] == device]
        _draw_roofline(left, device, mine)
        _draw_bandwidth(right, mine)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
