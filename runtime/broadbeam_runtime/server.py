"""The HTTP surface of one rank: OpenAI's API, tokenise and detokenise, health and metrics."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from broadbeam_runtime import openai_api as api
from broadbeam_runtime.chat_template import TemplateError
from broadbeam_runtime.core import ModelInfo
from broadbeam_runtime.detokenizer import Delta
from broadbeam_runtime.generation import EngineClient, GenerationError, Sequences
from broadbeam_runtime.metrics import CONTENT_TYPE, RankMetrics
from broadbeam_runtime.openai_responses import ChatShape, CompletionShape, Usage
from broadbeam_runtime.tokenizer import Tokenizer

MAX_BODY_BYTES = 32 * 2**20
RETRY_AFTER_S = 1


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the server knows once the engine has started."""

    info: ModelInfo
    tokenizer: Tokenizer
    client: EngineClient


class RankServer:
    """Answers from the first moment: 503 until `serve` is called, and again once draining."""

    def __init__(
        self, name: str, source: str, can_transfer: bool, stream_interval: int, metrics: RankMetrics
    ) -> None:
        self._name = name
        self._source = source
        self._can_transfer = can_transfer
        self._interval = stream_interval
        self._metrics = metrics
        self._served: ServedModel | None = None
        self.draining = False
        self.failure: str | None = None

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._errors], client_max_size=MAX_BODY_BYTES)
        app.add_routes(
            [
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat),
                web.get("/v1/models", self._models),
                web.post("/tokenize", self._tokenize),
                web.post("/detokenize", self._detokenize),
                web.get("/health", self._health),
                web.get("/metrics", self._metrics_page),
            ]
        )
        return app

    def serve(self, served: ServedModel) -> None:
        self._served = served

    # --- endpoints

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        served = self._ready()
        body = api.decode(await request.read(), api.CompletionRequest)
        self._check_model(body.model)
        prompts = _prompts(body, served)
        wanted = api.generation(body, prompts, served.info.max_model_len, self._can_transfer)
        answer_id = api.request_id(request.headers.get("X-Request-Id"), "cmpl", uuid.uuid4().hex)
        shape = CompletionShape(
            answer_id, self._name, served.tokenizer, wanted.return_token_ids, body.logprobs is not None
        )
        return await self._generate(request, served, wanted, answer_id, shape)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        served = self._ready()
        body = api.decode(await request.read(), api.ChatRequest)
        self._check_model(body.model)
        prompt = _chat_prompt(body, served.tokenizer)
        wanted = api.generation(body, (prompt,), served.info.max_model_len, self._can_transfer)
        answer_id = api.request_id(request.headers.get("X-Request-Id"), "chatcmpl", uuid.uuid4().hex)
        shape = ChatShape(
            answer_id, self._name, served.tokenizer, wanted.return_token_ids, bool(body.logprobs)
        )
        return await self._generate(request, served, wanted, answer_id, shape)

    async def _models(self, _: web.Request) -> web.Response:
        served = self._ready()
        model = {
            "id": self._name,
            "object": "model",
            "created": 0,
            "owned_by": "broadbeam",
            "root": self._source,
            "parent": None,
            "max_model_len": served.info.max_model_len,
        }
        return _json({"object": "list", "data": [model]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        served = self._ready()
        body = api.decode(await request.read(), api.TokenizeRequest)
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise api.ApiError(400, "give either prompt or messages", "prompt")
        if body.messages is not None:
            text = _render(served.tokenizer, body.messages, body.add_generation_prompt)
            tokens = served.tokenizer.encode(text, bool(body.add_special_tokens))
        else:
            tokens = served.tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)
        shown = (
            [served.tokenizer.decode([token], False) for token in tokens] if body.return_token_strs else None
        )
        count, limit = len(tokens), served.info.max_model_len
        return _json({"count": count, "max_model_len": limit, "tokens": tokens, "token_strs": shown})

    async def _detokenize(self, request: web.Request) -> web.Response:
        served = self._ready()
        body = api.decode(await request.read(), api.DetokenizeRequest)
        self._check_model(body.model)
        _check_ids(body.tokens, served.info.vocab_size, "tokens")
        return _json({"prompt": served.tokenizer.decode(body.tokens, False)})

    async def _health(self, _: web.Request) -> web.Response:
        if self.failure is not None:
            raise api.ApiError(503, self.failure)
        return web.Response(status=200 if self._served is not None else 503)

    async def _metrics_page(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.page(), headers={"Content-Type": CONTENT_TYPE})

    # --- answers

    async def _generate(
        self,
        request: web.Request,
        served: ServedModel,
        wanted: api.Generation,
        answer_id: str,
        shape: CompletionShape,
    ) -> web.StreamResponse:
        self._check_accepting()
        sequences = Sequences(served.client, answer_id, wanted, served.tokenizer)
        headers = {"X-Request-Id": request.headers.get("X-Request-Id", answer_id)}
        try:
            if wanted.stream:
                return await self._stream(request, sequences, wanted, shape, headers)
            async for _ in sequences.deltas():
                pass
        except GenerationError as error:
            raise api.ApiError(500, str(error)) from error
        finally:
            sequences.close()
        return _json(shape.whole(sequences.choices, _usage(sequences), _transfer(sequences)), headers)

    async def _stream(
        self,
        request: web.Request,
        sequences: Sequences,
        wanted: api.Generation,
        shape: CompletionShape,
        headers: dict[str, str],
    ) -> web.StreamResponse:
        # The status line waits for the first token, so that a failure before it is a plain error answer.
        response: web.StreamResponse | None = None
        pending = {choice.index: DeltaBuffer(self._interval) for choice in sequences.choices}
        try:
            async for choice, delta in sequences.deltas():
                if response is None:
                    response = await _open_stream(request, headers)
                    for chunk in shape.opening([item.index for item in sequences.choices]):
                        await response.write(_event(chunk))
                buffer = pending[choice.index]
                if (ready := buffer.add(delta)) is not None:
                    chunk = shape.chunk(choice, ready, first=buffer.sent_messages == 1)
                    if wanted.usage_in_every_chunk:
                        chunk["usage"] = _usage(sequences).body()
                    await response.write(_event(chunk))
        except GenerationError as error:
            if response is None:
                raise
            await response.write(_event(api.ApiError(500, str(error)).body()))
        assert response is not None
        if wanted.include_usage and all(choice.finish for choice in sequences.choices):
            await response.write(_event(shape.usage_chunk(_usage(sequences))))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    # --- checks

    def _ready(self) -> ServedModel:
        if self._served is None:
            raise api.ApiError(503, "the model is loading", code="loading")
        return self._served

    def _check_accepting(self) -> None:
        if self.failure is not None:
            raise api.ApiError(503, self.failure)
        if self.draining:
            raise api.ApiError(503, "this server is stopping and takes no new requests", code="draining")

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._name:
            raise api.ApiError(404, f"the model `{name}` does not exist", "model", "model_not_found")

    @web.middleware
    async def _errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """The one table from exceptions to OpenAI's error bodies."""
        try:
            return await handler(request)
        except api.ApiError as error:
            failure = error
        except TemplateError as error:
            failure = api.ApiError(400, str(error), "messages")
        except web.HTTPRequestEntityTooLarge:
            failure = api.ApiError(413, f"the request body is larger than {MAX_BODY_BYTES} bytes")
        except web.HTTPNotFound:
            failure = api.ApiError(404, f"no such path: {request.path}")
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            failure = api.ApiError(405, f"{request.method} is not allowed on {request.path}, use {allowed}")
        headers = {"Retry-After": str(RETRY_AFTER_S)} if failure.status == 503 else None
        return _json(failure.body(), headers, failure.status)


class DeltaBuffer:
    """Joins deltas of one choice until `interval` tokens wait; the first and the last go at once."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._waiting: list[Delta] = []
        self.sent_messages = 0

    def add(self, delta: Delta) -> Delta | None:
        self._waiting.append(delta)
        tokens = sum(len(item.token_ids) for item in self._waiting)
        if delta.finish is None and self.sent_messages and tokens < self._interval:
            return None
        joined = Delta(
            "".join(item.text for item in self._waiting),
            tuple(token for item in self._waiting for token in item.token_ids),
            tuple(item for waiting in self._waiting for item in waiting.logprobs),
            delta.finish,
            delta.stop_reason,
        )
        self._waiting = []
        self.sent_messages += 1
        return joined


def _prompts(body: api.CompletionRequest, served: ServedModel) -> tuple[tuple[int, ...], ...]:
    """`prompt` as token ids: a string, token ids, or a list of either."""
    prompt = body.prompt
    if isinstance(prompt, str):
        items: list[Any] = [prompt]
    elif prompt and all(type(item) is int for item in prompt):
        items = [prompt]
    else:
        items = prompt
    prompts = tuple(_prompt(item, body.add_special_tokens, served) for item in items)
    if not prompts or not all(prompts):
        raise api.ApiError(400, "prompt is empty", "prompt")
    return prompts


def _prompt(item: Any, add_special_tokens: bool, served: ServedModel) -> tuple[int, ...]:
    if isinstance(item, str):
        ids = served.tokenizer.encode(item, add_special_tokens)
        if ids and max(ids) >= served.info.vocab_size:
            raise api.ApiError(
                500,
                f"the tokenizer made token {max(ids)}, but the model knows {served.info.vocab_size} tokens",
            )
        return tuple(ids)
    if isinstance(item, list) and all(type(token) is int for token in item):
        _check_ids(item, served.info.vocab_size, "prompt")
        return tuple(item)
    raise api.ApiError(400, "prompt must be a string, a list of token ids, or a list of either", "prompt")


def _check_ids(ids: list[int], vocab_size: int, name: str) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise api.ApiError(
                400, f"{name} holds token id {token}, it must be between 0 and {vocab_size - 1}", name
            )


def _chat_prompt(body: api.ChatRequest, tokenizer: Tokenizer) -> tuple[int, ...]:
    if body.continue_final_message and body.add_generation_prompt:
        raise api.ApiError(
            400, "continue_final_message needs add_generation_prompt to be false", "continue_final_message"
        )
    if body.continue_final_message:
        raise api.ApiError(400, "continue_final_message is not supported yet", "continue_final_message")
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    text = _render(tokenizer, body.messages, body.add_generation_prompt, variables)
    # The template writes the special tokens itself.
    return tuple(tokenizer.encode(text, body.add_special_tokens))


def _render(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    variables: dict[str, Any] | None = None,
) -> str:
    if tokenizer.chat is None:
        raise api.ApiError(400, "this model has no chat template, use /v1/completions", "messages")
    if not messages:
        raise api.ApiError(400, "messages is empty", "messages")
    reserved = {"messages", "tools", "documents", "add_generation_prompt"} & set(variables or {})
    if reserved:
        raise api.ApiError(
            400, f"chat_template_kwargs must not set {sorted(reserved)[0]}", "chat_template_kwargs"
        )
    plain = [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]
    return tokenizer.chat.render(plain, add_generation_prompt, **(variables or {}))


def _plain(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The message with `content` as one string, which is what chat templates take."""
    if not isinstance(message.get("role"), str):
        raise api.ApiError(400, f"{where}.role must be a string", "messages")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return {**message, "content": content or ""}
    if not isinstance(content, list):
        raise api.ApiError(400, f"{where}.content must be a string or a list of text parts", "messages")
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in content
    ]
    if not all(isinstance(text, str) for text in texts):
        raise api.ApiError(400, f"{where}.content: only parts of type text are supported yet", "messages")
    return {**message, "content": "\n".join(str(text) for text in texts)}


def _usage(sequences: Sequences) -> Usage:
    prompts = {id(choice.prompt): len(choice.prompt) for choice in sequences.choices}
    completion = sum(len(choice.token_ids) for choice in sequences.choices)
    return Usage(sum(prompts.values()), completion, sequences.cached_tokens)


def _transfer(sequences: Sequences) -> dict[str, Any] | None:
    """A prefill answer's `kv_transfer_params`: the connector's, with the token that was sampled here."""
    params = sequences.kv_transfer_params
    choice = sequences.choices[0]
    if params is None or not choice.token_ids:
        return params
    logprob = choice.logprobs[0] if choice.logprobs else None
    return api.transfer_answer(params, choice.token_ids[0], logprob, sequences.cached_tokens)


async def _open_stream(request: web.Request, headers: dict[str, str]) -> web.StreamResponse:
    head = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", **headers}
    response = web.StreamResponse(headers=head)
    await response.prepare(request)
    return response


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _json(body: dict[str, Any], headers: dict[str, str] | None = None, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json", headers=headers
    )
