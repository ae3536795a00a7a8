"""How long `broadbeam demo` takes, caches warm, as JSON lines: `python -m broadbeam_operator.local.bench`.

It runs the command as a person does, once to warm the caches (a model to fetch, perhaps) and then RUNS times.
With `--write` the lines take the place of this bench's lines in operator/baselines.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
BASELINES = ROOT / "operator" / "baselines.jsonl"
EXAMPLE = ROOT / "examples" / "laptop.yaml"
PROMPT = "Why is the sky blue? Answer in two sentences."
RUNS = 3
TIMEOUT_S = 1200.0
FIGURES = {  # row of the demo's table -> (name of the figure, limit)
    r"start to available +([\d.]+) s": ("demo_available_s", 25.0, 1.0),
    r"time to first token +([\d.]+) ms": ("demo_first_token_s", 1.0, 1000.0),
    r"speed +([\d.]+) tokens/s": ("demo_tokens_per_s", None, 1.0),
}


def run_demo() -> str:
    """What the demo printed; CalledProcessError if it did not answer over the P/D path."""
    command = [sys.executable, "-m", "broadbeam_operator.cli", "demo", str(EXAMPLE), "--prompt", PROMPT]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout


def read(output: str, pattern: str, divisor: float) -> float:
    found = re.search(pattern, output)
    assert found, f"the demo's table has no row like {pattern!r}:\n{output}"
    return float(found[1]) / divisor


def lines(outputs: list[str]) -> list[dict[str, Any]]:
    made = []
    for pattern, (what, limit, divisor) in FIGURES.items():
        value = round(statistics.median(read(output, pattern, divisor) for output in outputs), 3)
        verdict = {} if limit is None else {"limit": limit, "ok": value <= limit}
        about = {"runs": len(outputs), "python": platform.python_version(), "cpus": os.cpu_count()}
        made.append({"bench": "demo", "what": what, "value": value, **verdict, **about})
    return made


def replace_baselines(made: list[str]) -> None:
    kept = BASELINES.read_text().splitlines() if BASELINES.exists() else []
    kept = [row for row in kept if json.loads(row)["bench"] != "demo"]
    BASELINES.write_text("".join(f"{row}\n" for row in [*kept, *made]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"keep the lines in {BASELINES.name}")
    write = parser.parse_args().write
    run_demo()
    made = [json.dumps(each) for each in lines([run_demo() for _ in range(RUNS)])]
    print("\n".join(made))
    if write:
        replace_baselines(made)


if __name__ == "__main__":
    main()
