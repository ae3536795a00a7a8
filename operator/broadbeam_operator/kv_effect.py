"""Whether KV transfer works: do decode ranks fetch prompts, or quietly compute them again?

vLLM's counter `vllm:prompt_tokens_by_source_total` says for every prompt token where its keys and values
came from. On a decode rank behind a prefill rank, nearly all must be `external_kv_transfer`; one token a
request is computed locally where the prefill side hands over no first token.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import aiohttp

from broadbeam_crds.conventions import ANNOTATION_RANKS, LABEL_ROLE, RANK_HTTP_PORT, SUPERVISOR_PORT
from broadbeam_operator import pods
from broadbeam_operator.cluster import Object
from broadbeam_operator.observe import Observed

METRIC = re.compile(rb'^vllm:prompt_tokens_by_source_total\{[^}]*source="(\w+)"[^}]*\} (\S+)', re.MULTILINE)
ENOUGH_TOKENS = 64  # fewer say nothing: the odd token is always computed locally
LOOK_EVERY_S = 2.0  # a burst of passes asks the pods once
SCRAPE_TIMEOUT = aiohttp.ClientTimeout(total=1.0)
MAX_BYTES = 4 * 2**20

Verdict = Literal["effective", "recomputed"]


class Tokens(NamedTuple):
    """Prompt tokens of a pod's ranks."""

    transferred: float = 0.0
    computed: float = 0.0

    def since(self, earlier: Tokens) -> Tokens:
        """Counters start again at 0 with their process."""
        if self.transferred < earlier.transferred or self.computed < earlier.computed:
            return self
        return Tokens(self.transferred - earlier.transferred, self.computed - earlier.computed)


class KVMeter(Protocol):
    """Reads counters; the seam at which tests put numbers."""

    async def read(self, targets: Mapping[str, Sequence[str]]) -> Mapping[str, Tokens]:
        """`targets`: pod uid -> URLs of its metrics. Pods that did not answer are left out."""


@dataclass(frozen=True, slots=True)
class HttpMeter:
    session: aiohttp.ClientSession

    async def read(self, targets: Mapping[str, Sequence[str]]) -> Mapping[str, Tokens]:
        found = await asyncio.gather(*(self._pod(urls) for urls in targets.values()))
        return {uid: tokens for uid, tokens in zip(targets, found, strict=True) if tokens is not None}

    async def _pod(self, urls: Sequence[str]) -> Tokens | None:
        try:
            pages = await asyncio.gather(*(self._page(url) for url in urls))
        except (aiohttp.ClientError, TimeoutError):
            return None
        return parse(b"\n".join(pages))

    async def _page(self, url: str) -> bytes:
        async with self.session.get(url, timeout=SCRAPE_TIMEOUT) as response:
            response.raise_for_status()
            return await response.content.read(MAX_BYTES)


def parse(page: bytes) -> Tokens:
    transferred = computed = 0.0
    for source, value in METRIC.findall(page):
        if source == b"external_kv_transfer":
            transferred += float(value)
        elif source == b"local_compute":
            computed += float(value)
    return Tokens(transferred, computed)


class KVWatch:
    """Counters as they were at the last verdict of each cluster. It is a sensor's memory, not a decision's:
    after a restart the first look takes all tokens since the pods started."""

    def __init__(
        self, meter: KVMeter, every_s: float = LOOK_EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._meter = meter
        self._every_s = every_s
        self._clock = clock
        self._looked: dict[tuple[str, str], float] = {}
        self._before: dict[tuple[str, str], Mapping[str, Tokens]] = {}

    async def look(self, seen: Observed, engine: str) -> Verdict | None:
        """None while there was too little traffic to say, or the last look was just now."""
        key = (seen.namespace, seen.name)
        if self._clock() - self._looked.get(key, -self._every_s) < self._every_s:
            return None
        self._looked[key] = self._clock()
        now = await self._meter.read(targets(seen, engine))
        before = self._before.get(key, {})
        moved = [tokens.since(before.get(uid, Tokens())) for uid, tokens in now.items()]
        found = verdict(Tokens(sum(each.transferred for each in moved), sum(each.computed for each in moved)))
        if found is not None:
            self._before[key] = now
        return found

    def forget(self, namespace: str, name: str) -> None:
        self._before.pop((namespace, name), None)
        self._looked.pop((namespace, name), None)


def verdict(tokens: Tokens) -> Verdict | None:
    if tokens.transferred > 0 and tokens.transferred >= tokens.computed:
        return "effective"
    return "recomputed" if tokens.computed >= ENOUGH_TOKENS else None


def targets(seen: Observed, engine: str) -> dict[str, list[str]]:
    """Where the metrics of ready decode pods are. Our supervisor answers for its ranks, vLLM's does not."""
    return {
        str(pod["metadata"]["uid"]): _urls(pod, engine)
        for pod in seen.pods
        if (pod["metadata"].get("labels") or {}).get(LABEL_ROLE) == "decode"
        and not pods.leaving(pod)
        and pods.is_true(pod, "Ready")
        and pod.get("status", {}).get("podIP")
    }


def _urls(pod: Object, engine: str) -> list[str]:
    address = pod["status"]["podIP"]
    host = f"[{address}]" if ":" in address else address
    if engine != "vllm":
        return [f"http://{host}:{SUPERVISOR_PORT}/metrics"]
    ranks = int(pod["metadata"]["annotations"][ANNOTATION_RANKS])
    return [f"http://{host}:{RANK_HTTP_PORT + rank}/metrics" for rank in range(ranks)]
