from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web

from broadbeam_operator.local.demo import Moved, failures
from broadbeam_operator.local.progress import Throughput
from broadbeam_operator.local.question import Answer, QuestionError, ask

GOOD = Answer(text="Because.", prefill="p/0", decode="d/0", prompt_tokens=20)
ALL_MOVED = Moved(transferred_tokens=20, computed_tokens=0, transferred_bytes=1)


@pytest.mark.parametrize(
    ("answer", "moved", "wrong"),
    [
        pytest.param(GOOD, ALL_MOVED, [], id="all of it moved"),
        pytest.param(replace(GOOD, text=""), ALL_MOVED, ["the answer is empty"], id="no text"),
        pytest.param(
            replace(GOOD, prefill=""),
            Moved(0, 20, 0),
            [
                "the gateway names no prefill process (no x-broadbeam-prefill header)",
                "decode ranks computed 20 prompt tokens themselves, 0 expected",
                "KV transfer moved 0 tokens, the prompt has 20",
            ],
            id="decode only",
        ),
        pytest.param(
            GOOD,
            Moved(19, 1, 1),
            [
                "decode ranks computed 1 prompt tokens themselves, 0 expected",
                "KV transfer moved 19 tokens, the prompt has 20",
            ],
            id="one token recomputed",
        ),
    ],
)
def test_a_demo_fails_unless_every_prompt_token_was_moved(
    answer: Answer, moved: Moved, wrong: list[str]
) -> None:
    assert list(failures(answer, moved)) == wrong


def test_what_was_moved_is_what_counters_grew_by() -> None:
    before = Throughput(transferred_tokens=5, computed_tokens=2, transferred_bytes=10)
    after = Throughput(transferred_tokens=25, computed_tokens=2, transferred_bytes=30)
    assert Moved.between(before, after) == Moved(20, 0, 20)


Serve = Callable[[int, str], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """A gateway that gives one fixed answer; its URL."""
    runners = []

    async def start(status: int, body: str) -> str:
        async def answer(request: web.Request) -> web.Response:
            headers = {"x-broadbeam-prefill": "p/0", "x-broadbeam-decode": "d/1"}
            return web.Response(status=status, text=body, headers=headers)

        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        runners.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert runner.addresses
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


async def put(url: str, shown: list[str]) -> Answer:
    async with aiohttp.ClientSession() as http:
        return await ask(http, url, "m", "why?", 8, None, shown.append)


async def test_an_answer_is_shown_piece_by_piece(serve: Serve) -> None:
    body = (
        'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
        'data: {"choices":[{"delta":{"content":"Be"}}]}\n\n'
        'data: {"choices":[{"delta":{"content":"cause"},"finish_reason":"stop"}]}\n\n'
        'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2}}\n\n'
        "data: [DONE]\n\n"
    )
    shown: list[str] = []
    answer = await put(await serve(200, body), shown)
    assert shown == ["Be", "cause"]
    assert (answer.text, answer.finish) == ("Because", "stop")
    assert (answer.prompt_tokens, answer.completion_tokens) == (9, 2)
    assert (answer.prefill, answer.decode) == ("p/0", "d/1")


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        pytest.param(
            503, '{"error":{"message":"none ready"}}', "the gateway answered 503: none ready", id="an error"
        ),
        pytest.param(500, "oh", "the gateway answered 500: oh", id="no JSON"),
        pytest.param(
            200,
            'data: {"choices":[{"delta":{"content":"B"}}]}\n\n',
            "the answer broke off before its end",
            id="cut",
        ),
        pytest.param(
            200,
            'data: {"error":{"message":"rank died"}}\n\n',
            "the engine failed: rank died",
            id="in the stream",
        ),
        pytest.param(200, "data: {\n\n", "the gateway sent no JSON", id="broken JSON"),
    ],
)
async def test_an_answer_that_fails_is_one_line(serve: Serve, status: int, body: str, message: str) -> None:
    url = await serve(status, body)
    with pytest.raises(QuestionError, match=message):
        await put(url, [])
