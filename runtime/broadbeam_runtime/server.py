"""The HTTP surface of one rank: OpenAI's API, tokenise and detokenise, health and metrics."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import msgspec
from aiohttp import web

from broadbeam_runtime import openai_api as api
from broadbeam_runtime import prompts, request_checks, transfer_params
from broadbeam_runtime.api_error import ApiError
from broadbeam_runtime.chat_template import TemplateError
from broadbeam_runtime.core import ModelInfo
from broadbeam_runtime.detokenizer import DeltaBuffer
from broadbeam_runtime.generation import EngineClient, GenerationError, Sequences
from broadbeam_runtime.metrics import CONTENT_TYPE, RankMetrics
from broadbeam_runtime.openai_responses import ChatShape, CompletionShape, Usage
from broadbeam_runtime.request_checks import Generation
from broadbeam_runtime.tokenizer import Tokenizer

MAX_BODY_BYTES = 32 * 2**20
RETRY_AFTER_S = 1
LARGE_BODY_BYTES = 2**16  # takes the tokenizer some 50 ms, which other answers need not wait for
P = ParamSpec("P")
T = TypeVar("T")


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
        raw = await request.read()
        body = api.decode(raw, api.CompletionRequest)
        self._check_model(body.model)
        prompt_ids = await _beside(raw, prompts.of_completion, body, served.tokenizer, served.info)
        wanted = request_checks.generation(body, prompt_ids, served.info, self._can_transfer)
        answer_id = api.request_id(request.headers.get("X-Request-Id"), "cmpl", uuid.uuid4().hex)
        shape = CompletionShape(answer_id, self._name, served.tokenizer, wanted, body.logprobs is not None)
        return await self._generate(request, served, wanted, answer_id, shape)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        served = self._ready()
        raw = await request.read()
        body = api.decode(raw, api.ChatRequest)
        self._check_model(body.model)
        prompt = await _beside(raw, prompts.of_chat, body, served.tokenizer, served.info)
        wanted = request_checks.generation(body, (prompt,), served.info, self._can_transfer)
        answer_id = api.request_id(request.headers.get("X-Request-Id"), "chatcmpl", uuid.uuid4().hex)
        shape = ChatShape(answer_id, self._name, served.tokenizer, wanted, bool(body.logprobs))
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
        raw = await request.read()
        body = api.decode(raw, api.TokenizeRequest)
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        if body.messages is not None:
            text, special = prompts.render(served.tokenizer, body.messages, body.add_generation_prompt), False
        else:
            text, special = body.prompt or "", True
        special = special if body.add_special_tokens is None else body.add_special_tokens
        tokens = await _beside(raw, prompts.encode, text, special, served.tokenizer, served.info, "prompt")
        shown = (
            [served.tokenizer.decode([token], False) for token in tokens] if body.return_token_strs else None
        )
        count, limit = len(tokens), served.info.max_model_len
        return _json({"count": count, "max_model_len": limit, "tokens": tokens, "token_strs": shown})

    async def _detokenize(self, request: web.Request) -> web.Response:
        served = self._ready()
        body = api.decode(await request.read(), api.DetokenizeRequest)
        self._check_model(body.model)
        request_checks.check_ids(body.tokens, served.info.vocab_size, "tokens")
        return _json({"prompt": served.tokenizer.decode(body.tokens, False)})

    async def _health(self, _: web.Request) -> web.Response:
        if self.failure is not None:
            raise ApiError(503, self.failure)
        return web.Response(status=200 if self._served is not None else 503)

    async def _metrics_page(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.page(), headers={"Content-Type": CONTENT_TYPE})

    # --- answers

    async def _generate(
        self,
        request: web.Request,
        served: ServedModel,
        wanted: Generation,
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
            raise ApiError(500, str(error)) from error
        finally:
            sequences.close()
        return _json(shape.whole(sequences.choices, _usage(sequences), _transfer(sequences)), headers)

    async def _stream(
        self,
        request: web.Request,
        sequences: Sequences,
        wanted: Generation,
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
            await response.write(_event(ApiError(500, str(error)).body()))
        assert response is not None
        if wanted.include_usage and all(choice.finish for choice in sequences.choices):
            await response.write(_event(shape.usage_chunk(_usage(sequences))))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    # --- checks

    def _ready(self) -> ServedModel:
        if self._served is None:
            raise ApiError(503, "the model is loading", code="loading")
        return self._served

    def _check_accepting(self) -> None:
        if self.failure is not None:
            raise ApiError(503, self.failure)
        if self.draining:
            raise ApiError(503, "this server is stopping and takes no new requests", code="draining")

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._name:
            raise ApiError(404, f"the model `{name}` does not exist", "model", "model_not_found")

    @web.middleware
    async def _errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """The one table from exceptions to OpenAI's error bodies."""
        try:
            return await handler(request)
        except ApiError as error:
            failure = error
        except TemplateError as error:
            failure = ApiError(400, str(error), "messages")
        except web.HTTPRequestEntityTooLarge:
            failure = ApiError(413, f"the request body is larger than {MAX_BODY_BYTES} bytes")
        except web.HTTPNotFound:
            failure = ApiError(404, f"no such path: {request.path}")
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            failure = ApiError(405, f"{request.method} is not allowed on {request.path}, use {allowed}")
        headers = {"Retry-After": str(RETRY_AFTER_S)} if failure.status == 503 else None
        return _json(failure.body(), headers, failure.status)


async def _beside(body: bytes, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`make`'s answer; from a thread if `body` is large, so that the event loop goes on meanwhile."""
    if len(body) < LARGE_BODY_BYTES:
        return make(*args, **kwargs)
    return await asyncio.to_thread(make, *args, **kwargs)


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
    return transfer_params.answer(params, choice.token_ids[0], logprob, sequences.cached_tokens)


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
