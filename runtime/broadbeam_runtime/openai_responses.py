"""The bodies of answers, streamed and whole, in OpenAI's shapes with vLLM's token-id fields."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from broadbeam_runtime.core import FinishReason, TokenLogprob
from broadbeam_runtime.detokenizer import ByteDetokenizer, Delta, WindowDetokenizer, detokenizer, token_text
from broadbeam_runtime.request_checks import Generation
from broadbeam_runtime.tokenizer import Tokenizer

FINGERPRINT = f"broadbeam-{version('broadbeam')}"


@dataclass(slots=True)
class Choice:
    """What one sequence has answered so far."""

    index: int
    prompt: tuple[int, ...]
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish, self.stop_reason = delta.finish, delta.stop_reason


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class TextOffset:
    """Characters of an answer before its next token: a token that is only part of one adds none."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._detokenizer: ByteDetokenizer | WindowDetokenizer = detokenizer(tokenizer, skip_special_tokens)
        self._characters = 0

    def pass_by(self, token_id: int) -> int:
        """Where this token's text begins."""
        begins = self._characters
        self._characters += len(self._detokenizer.push(token_id))
        return begins


class CompletionShape:
    """Bodies of /v1/completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(
        self, answer_id: str, model: str, tokenizer: Tokenizer, wanted: Generation, logprobs: bool
    ) -> None:
        self._head = {"id": answer_id, "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._token_ids = wanted.return_token_ids
        self._skip_special = wanted.text.skip_special_tokens
        self._logprobs = logprobs
        self._offsets: dict[int, TextOffset] = {}

    def opening(self, indexes: Sequence[int]) -> list[dict[str, Any]]:
        """Chunks before the first delta."""
        return []

    def chunk(self, choice: Choice, delta: Delta, first: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "index": choice.index,
            **self._content(choice.index, delta.text, delta.logprobs, True),
            "finish_reason": delta.finish,
            "stop_reason": delta.stop_reason,
        }
        if self._token_ids:
            body["token_ids"] = list(delta.token_ids)
            if first:
                body["prompt_token_ids"] = list(choice.prompt)
        return self._envelope(self.chunk_kind, [body])

    def whole(
        self, choices: Sequence[Choice], usage: Usage, transfer: dict[str, Any] | None
    ) -> dict[str, Any]:
        answer = self._envelope(self.kind, [self._whole_choice(choice) for choice in choices])
        answer |= {"system_fingerprint": FINGERPRINT, "usage": usage.body()}
        if transfer is not None:
            answer["kv_transfer_params"] = transfer
        return answer

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {
            **self._envelope(self.chunk_kind, []),
            "usage": usage.body(),
            "system_fingerprint": FINGERPRINT,
        }

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._head["id"], "object": kind, **self._head, "choices": choices}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        body: dict[str, Any] = {
            "index": choice.index,
            **self._content(choice.index, "".join(choice.text), choice.logprobs, False),
            "finish_reason": choice.finish,
            "stop_reason": choice.stop_reason,
        }
        if self._token_ids:
            body["token_ids"] = list(choice.token_ids)
            body["prompt_token_ids"] = list(choice.prompt)
        return body

    def _content(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], streamed: bool
    ) -> dict[str, Any]:
        return {
            "text": text,
            "logprobs": self._completion_logprobs(index, logprobs) if self._logprobs else None,
        }

    def _completion_logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Parallel lists; `text_offset` is where a token's text begins in the answer."""
        body: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        if index not in self._offsets:
            self._offsets[index] = TextOffset(self._tokenizer, self._skip_special)
        offset = self._offsets[index]
        for item in logprobs:
            text = token_text(self._tokenizer, item.token_id)
            top = {token_text(self._tokenizer, token): value for token, value in item.top}
            body["tokens"].append(text)
            body["token_logprobs"].append(item.logprob)
            body["top_logprobs"].append({text: item.logprob} | top)
            body["text_offset"].append(offset.pass_by(item.token_id))
        return body


class ChatShape(CompletionShape):
    """Bodies of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, indexes: Sequence[int]) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        head = {"delta": delta, "logprobs": None, "finish_reason": None}
        return [self._envelope(self.chunk_kind, [{"index": index, **head}]) for index in indexes]

    def _content(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob], streamed: bool
    ) -> dict[str, Any]:
        shown = {"content": [self._chat_logprob(item) for item in logprobs]} if self._logprobs else None
        if streamed:
            return {"delta": {"content": text}, "logprobs": shown}
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": shown}

    def _chat_logprob(self, item: TokenLogprob) -> dict[str, Any]:
        top = [self._entry(token, value) for token, value in item.top]
        return {**self._entry(item.token_id, item.logprob), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(self._tokenizer, token_id)
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode() if raw is None else raw)}
