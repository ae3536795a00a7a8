"""One streamed chat question to the gateway, as any client would ask it, and what can be learnt from it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

TIMEOUT = aiohttp.ClientTimeout(total=600, connect=5)


class QuestionError(Exception):
    """The gateway could not be asked or gave no answer; one line."""


@dataclass(slots=True)
class Answer:
    """`prefill` and `decode` are endpoint names from the gateway's headers; seconds since the question."""

    text: str = ""
    prefill: str = ""
    decode: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    finish: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Of the tokens after the first."""
        elapsed = self.last_token_s - self.first_token_s
        return (self.completion_tokens - 1) / elapsed if elapsed > 0 and self.completion_tokens > 1 else 0.0


async def ask(
    http: aiohttp.ClientSession,
    url: str,
    model: str,
    prompt: str,
    max_tokens: int,
    key: str | None,
    show: Callable[[str], None],
) -> Answer:
    """Ask, and `show` each piece of the answer as it arrives; greedy, so that it can be repeated."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    begun, answer = time.monotonic(), Answer()
    try:
        async with http.post(
            f"{url}/v1/chat/completions", json=body, headers=headers, timeout=TIMEOUT
        ) as response:
            if response.status != 200:
                raise QuestionError(
                    f"the gateway answered {response.status}: {_reason(await response.read())}"
                )
            answer.prefill = response.headers.get("x-broadbeam-prefill", "")
            answer.decode = response.headers.get("x-broadbeam-decode", "")
            async for event in _events(response):
                _take(answer, event, time.monotonic() - begun, show)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise QuestionError(f"the answer broke off: {error or type(error).__name__}") from error
    if not answer.finish:
        raise QuestionError("the answer broke off before its end")
    return answer


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of every server-sent event before [DONE]."""
    async for line in response.content:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        try:
            yield msgspec.json.decode(data, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise QuestionError(f"the gateway sent no JSON: {error}") from error


def _take(answer: Answer, event: dict[str, Any], elapsed_s: float, show: Callable[[str], None]) -> None:
    if error := event.get("error"):
        raise QuestionError(f"the engine failed: {error.get('message', error)}")
    if usage := event.get("usage"):
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.completion_tokens = usage["completion_tokens"]
    for choice in event.get("choices") or ():
        answer.finish = choice.get("finish_reason") or answer.finish
        if piece := (choice.get("delta") or {}).get("content"):
            answer.first_token_s = answer.first_token_s or elapsed_s
            answer.last_token_s = elapsed_s
            answer.text += piece
            show(piece)


def _reason(body: bytes) -> str:
    try:
        error = msgspec.json.decode(body, type=dict[str, Any]).get("error")
        return str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.MsgspecError, KeyError):
        return body[:200].decode(errors="replace")
