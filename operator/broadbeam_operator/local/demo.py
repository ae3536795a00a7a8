"""`broadbeam demo`: run a cluster, ask it one question, and prove that prefill and decode worked apart."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import aiohttp
from rich.console import Console
from rich.table import Table

from broadbeam_crds.conventions import GATEWAY_METRICS_PORT, LABEL_ROLE
from broadbeam_operator.cluster import POD
from broadbeam_operator.local.exposition import samples, total
from broadbeam_operator.local.progress import Throughput, metrics, throughput
from broadbeam_operator.local.question import Answer, QuestionError, ask
from broadbeam_operator.local.session import Session
from broadbeam_operator.local.up import EXIT_FAILED, EXIT_OK, Interrupt, Watch, pause, stop
from broadbeam_operator.local.view import MIB, View

READY_METRIC = "broadbeam_gateway_endpoints_ready"
SETTLE_S = 5.0  # for the gateway to see the last endpoint, and for counters after the answer


@dataclass(frozen=True, slots=True)
class Question:
    prompt: str
    max_tokens: int
    key: str | None


@dataclass(frozen=True, slots=True)
class Moved:
    """How decode ranks' counters grew during the question."""

    transferred_tokens: float
    computed_tokens: float
    transferred_bytes: float

    @classmethod
    def between(cls, before: Throughput, after: Throughput) -> Moved:
        return cls(
            after.transferred_tokens - before.transferred_tokens,
            after.computed_tokens - before.computed_tokens,
            after.transferred_bytes - before.transferred_bytes,
        )


def failures(answer: Answer, moved: Moved) -> Iterator[str]:
    """Why this was not an answer over the P/D path; nothing if it was."""
    if not answer.text:
        yield "the answer is empty"
    if not answer.prefill:
        yield "the gateway names no prefill process (no x-broadbeam-prefill header)"
    if not answer.decode:
        yield "the gateway names no decode process (no x-broadbeam-decode header)"
    if moved.computed_tokens:
        yield f"decode ranks computed {moved.computed_tokens:.0f} prompt tokens themselves, 0 expected"
    if moved.transferred_tokens != answer.prompt_tokens:
        yield (
            f"KV transfer moved {moved.transferred_tokens:.0f} tokens, the prompt has {answer.prompt_tokens}"
        )


async def demo(
    session: Session, view: View, console: Console, interrupt: Interrupt, timeout_s: float, question: Question
) -> int:
    """The exit status; CannotServeError when the cluster does not become Available."""
    watch, begun = Watch(session, view), time.monotonic()
    if not await watch.until_available(interrupt, timeout_s):
        await stop(session, interrupt, view)
        return interrupt.exit_code
    await _until_gateway_knows(session, interrupt)
    available_s = time.monotonic() - begun
    view.say(f"available at {session.url}")
    asking = asyncio.create_task(_ask(session, view, console, question))
    interrupted = asyncio.create_task(interrupt.asked.wait())
    await asyncio.wait([asking, interrupted], return_when=asyncio.FIRST_COMPLETED)
    interrupted.cancel()
    if not asking.done():
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await stop(session, interrupt, view)
        return interrupt.exit_code
    wrong = _report(console, asking, available_s)
    await stop(session, interrupt, view)
    for line in wrong:
        print(f"broadbeam: demo failed: {line}", file=sys.stderr)
    return EXIT_FAILED if wrong else EXIT_OK


async def _until_gateway_knows(session: Session, interrupt: Interrupt) -> None:
    """Until the gateway has seen every pool's ranks: it reads the endpoints four times a second."""
    deadline = time.monotonic() + SETTLE_S
    roles = {pool.role for pool in session.cluster.spec.pools}
    url = f"{session.url.rpartition(':')[0]}:{GATEWAY_METRICS_PORT}/metrics"
    while time.monotonic() < deadline and not interrupt.asked.is_set():
        with suppress(aiohttp.ClientError):
            async with session.http.get(url) as response:
                found = samples(await response.text())
            if all(total(found, READY_METRIC, role=role) > 0 for role in roles):
                return
        await pause(interrupt, 0.05)


async def _ask(session: Session, view: View, console: Console, question: Question) -> tuple[Answer, Moved]:
    before = await _decode_counters(session)
    view.say(f"asking: {question.prompt}")
    answer = await ask(
        session.http,
        session.url,
        session.cluster.spec.model.name,
        question.prompt,
        question.max_tokens,
        question.key,
        lambda piece: console.print(piece, end="", markup=False, highlight=False, soft_wrap=True),
    )
    console.print()
    return answer, Moved.between(before, await _decode_counters(session))


async def _decode_counters(session: Session) -> Throughput:
    pods = session.store.select(POD, labels={LABEL_ROLE: "decode"})
    pages = await asyncio.gather(*(metrics(session.http, pod) for pod in pods))
    return throughput([sample for page in pages for sample in page])


def _report(
    console: Console, asking: asyncio.Task[tuple[Answer, Moved]], available_s: float
) -> Sequence[str]:
    """Print the table; what was wrong."""
    try:
        answer, moved = asking.result()
    except QuestionError as error:
        return [str(error)]
    console.print(summary(answer, moved, available_s))
    return list(failures(answer, moved))


def summary(answer: Answer, moved: Moved, available_s: float) -> Table:
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="dim")
    grid.add_column()
    for name, value in (
        ("prefilled by", answer.prefill or "-"),
        ("decoded by", answer.decode or "-"),
        ("prompt tokens", str(answer.prompt_tokens)),
        (
            "moved by KV transfer",
            f"{moved.transferred_tokens:.0f} tokens, {moved.transferred_bytes / MIB:.2f} MiB",
        ),
        ("computed by decode", f"{moved.computed_tokens:.0f} prompt tokens"),
        ("generated", f"{answer.completion_tokens} tokens"),
        ("time to first token", f"{answer.first_token_s * 1000:.0f} ms"),
        ("speed", f"{answer.tokens_per_s:.1f} tokens/s"),
        ("start to available", f"{available_s:.1f} s"),
    ):
        grid.add_row(name, value)
    return grid
