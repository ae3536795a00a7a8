"""The public port as a hostile or clumsy client sees it, byte by byte."""

from __future__ import annotations

import asyncio
import socket

import pytest

from broadbeam_crds.gateway_config import LimitsConfig, TimeoutsConfig
from broadbeam_router.app import Route
from broadbeam_router.fake_engine import Script
from broadbeam_router.openai import Fields
from broadbeam_router.serve import drain

BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
WHOLE = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
LIMITS = LimitsConfig(max_body_bytes=1000, max_header_bytes=1000, max_connections=3)


@pytest.fixture
async def rig(rig_of):
    return await rig_of({"d": "decode"}, limits=LIMITS)


async def until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not in time")


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(
            POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="CL + TE"
        ),
        pytest.param(
            POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", id="TE + CL"
        ),
        pytest.param(POST + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd", id="two CL"),
        pytest.param(POST + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd", id="two different CL"),
        pytest.param(POST + b"Content-Length: 4, 4\r\n\r\nabcd", id="CL list"),
        pytest.param(POST + b"Content-Length: +4\r\n\r\nabcd", id="CL with a sign"),
        pytest.param(POST + b"Content-Length: 0x4\r\n\r\nabcd", id="CL in hex"),
        pytest.param(POST + b"Content-Length: -1\r\n\r\n", id="CL below zero"),
        pytest.param(POST + b"Content-Length:\r\n\r\n", id="empty CL"),
        pytest.param(POST + b"Content-Length: 99999999999999999999999\r\n\r\n", id="CL overflow"),
        pytest.param(POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", id="TE gzip"),
        pytest.param(POST + b"Transfer-Encoding: identity\r\n\r\n", id="TE identity"),
        pytest.param(POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", id="TE not last"),
        pytest.param(POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", id="TE unknown"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", id="two TE"),
        pytest.param(POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", id="space before colon"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\n", id="chunk overflow"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", id="chunk below zero"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n", id="chunk in C hex"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}x", id="chunk without its end"),
        pytest.param(POST + b"X-A: b\r\n c\r\nContent-Length: 0\r\n\r\n", id="folded header"),
        pytest.param(POST + b"X-A: a\x00b\r\n\r\n", id="NUL in a header"),
        pytest.param(POST + b"X A: b\r\n\r\n", id="space in a header's name"),
        pytest.param(POST + b"no colon\r\n\r\n", id="header without colon"),
        pytest.param(POST + b"Host: b\r\n\r\n", id="two hosts"),
        pytest.param(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 0\r\n\r\n", id="no host"),
        pytest.param(POST + b"Authorization: a\r\nAuthorization: b\r\n\r\n", id="two keys"),
        pytest.param(POST + b"X-Request-Id: a\r\nX-Request-Id: b\r\n\r\n", id="two ids"),
        pytest.param(POST.replace(b"\r\n", b"\n") + b"\n", id="bare line feeds"),
        pytest.param(b"GET /health HTTP/3.0\r\nHost: a\r\n\r\n", id="HTTP/3"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
        pytest.param(b"CONNECT evil:80 HTTP/1.1\r\nHost: a\r\n\r\n", id="CONNECT"),
        pytest.param(
            b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
            id="upgrade",
        ),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
        pytest.param(b"hello\r\n\r\n", id="no HTTP"),
    ],
)
async def test_a_request_with_two_readings_is_refused(rig, request_bytes) -> None:
    answer = await rig.raw(request_bytes + WHOLE)
    assert answer.startswith(b"HTTP/1.1 400 "), answer
    assert b"Connection: close" in answer
    assert answer.count(b"HTTP/1.1") == 1, "what follows is not read as a request"
    assert not rig["d"].seen
    assert await rig.metric("requests_total", route="none", status="400") == 1


async def test_a_body_may_come_in_chunks_of_any_size(rig) -> None:
    for size in (1, 7, 1000):
        head = POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        answer = await rig.raw(head + chunked(BODY, size))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert rig["d"].seen[-1].body == BODY


async def test_a_request_may_come_byte_by_byte(rig) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    for byte in WHOLE:
        writer.write(bytes([byte]))
        await asyncio.sleep(0)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_requests_in_a_pipeline_are_answered_in_order(rig) -> None:
    rig["d"].script = lambda seen: Script(delay_s=0.05, words=(seen.headers["x-request-id"],))
    pipeline = b"".join(WHOLE.replace(b"Host: a", b"Host: a\r\nX-Request-Id: n%d" % i) for i in range(5))
    answer = await rig.raw(pipeline + HEALTH.replace(b"Host: a", b"Host: a\r\nConnection: close"))
    parts = answer.split(b"HTTP/1.1 200 OK")[1:]
    assert len(parts) == 6
    for i in range(5):
        assert b'"content": "n%d"' % i in parts[i]
    assert parts[5].endswith(b"ok\n")


async def test_a_bad_request_in_a_pipeline_is_answered_after_the_good_ones(rig) -> None:
    rig["d"].script = lambda seen: Script(delay_s=0.05)
    answer = await rig.raw(WHOLE + WHOLE + b"nonsense\r\n\r\n" + WHOLE)
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"400"]


async def test_a_deep_pipeline_is_served_to_its_end(rig) -> None:
    closing = HEALTH.replace(b"Host: a", b"Host: a\r\nConnection: close")
    answer = await rig.raw(HEALTH * 5000 + closing)
    assert answer.count(b"HTTP/1.1 200 OK") == 5001


async def test_a_connection_is_kept_and_closed_as_asked(rig) -> None:
    answer = await rig.raw(HEALTH + HEALTH, until=b"ok\n")
    assert b"Connection: close" not in answer
    old = await rig.raw(b"GET /health HTTP/1.0\r\n\r\n")
    assert b"Connection: close" in old


async def test_an_old_client_gets_a_stream_without_chunks(rig) -> None:
    body = BODY[:-1] + b',"stream":true}'
    head = b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
    answer = await rig.raw(head + body)
    assert b"Transfer-Encoding" not in answer
    assert answer.endswith(b"data: [DONE]\n\n")


async def test_the_target_may_be_absolute_but_its_host_means_nothing(rig) -> None:
    answer = await rig.raw(b"GET http://evil:1/health?x=1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")


async def test_a_client_may_wait_for_continue(rig) -> None:
    head = POST + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(head)
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(BODY)
    assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
    writer.close()


async def test_an_old_client_is_not_told_to_continue(rig) -> None:
    head = b"POST /v1/chat/completions HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    assert (await rig.raw(head % len(BODY) + BODY)).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        pytest.param(b"OPTIONS", b"/v1/chat/completions", b"POST", id="OPTIONS"),
        pytest.param(b"HEAD", b"/v1/completions", b"POST", id="HEAD"),
        pytest.param(b"DELETE", b"/v1/models", b"GET, HEAD", id="DELETE"),
    ],
)
async def test_a_method_that_is_not_allowed_is_answered_with_those_that_are(
    rig, method, path, allowed
) -> None:
    answer = await rig.raw(b"%b %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % (method, path))
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nAllow: %b\r\n" % allowed in answer
    assert answer.endswith(b"\r\n\r\n") == (method == b"HEAD"), "a HEAD has no body"


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(POST + b"Content-Length: 1001\r\n\r\n", id="announced"),
        pytest.param(POST + b"Content-Length: 1001\r\nExpect: 100-continue\r\n\r\n", id="announced, waiting"),
        pytest.param(
            POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"fffffff\r\n" + b"x" * 1001, id="one huge chunk"
        ),
        pytest.param(
            POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b"x" * 1001, 10), id="many chunks"
        ),
    ],
)
async def test_a_body_over_the_limit_is_refused_while_it_comes(rig, request_bytes) -> None:
    answer = await rig.raw(request_bytes)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"the body is larger than 1000 bytes" in answer
    assert b"100 Continue" not in answer


async def test_a_body_at_the_limit_is_not_refused(rig) -> None:
    body = BODY.replace(b"hi", b"x" * (1002 - len(BODY)))
    assert len(body) == 1000
    assert (await rig.post("/v1/chat/completions", body)).status == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(POST + b"X-A: " + b"x" * 1000 + b"\r\n\r\n", id="one header"),
        pytest.param(POST + b"A: b\r\n" * 200 + b"\r\n", id="many headers"),
        pytest.param(b"GET /" + b"x" * 1001 + b" HTTP/1.1\r\nHost: a\r\n\r\n", id="target"),
        pytest.param(POST + b"X-A: " + b"x" * 200_000, id="a header without end"),
        pytest.param(
            POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"T: x\r\n" * 200 + b"\r\n", id="trailers"
        ),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 200_000, id="chunk extension"),
    ],
)
async def test_a_head_over_the_limit_is_refused(rig, request_bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    for start in range(0, len(request_bytes), 5000):
        writer.write(request_bytes[start : start + 5000])
        await asyncio.sleep(0.001)
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 431 "), answer
    writer.close()


async def test_half_a_request_does_not_hold_a_connection_for_ever(rig_of) -> None:
    rig = await rig_of({"d": "decode"}, timeouts=TimeoutsConfig(idle_s=0.3))
    assert (await rig.raw(POST + b"Content-Length: 5\r\n\r\n{")).startswith(b"HTTP/1.1 408 ")
    assert await rig.raw(b"") == b"", "and an idle one is closed"


async def test_a_request_that_begins_late_on_a_kept_connection_has_all_its_time(rig_of) -> None:
    rig = await rig_of({"d": "decode"}, timeouts=TimeoutsConfig(idle_s=2))
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(HEALTH)
    await reader.readuntil(b"ok\n")
    (connection,) = rig.running.public.connections
    connection.deadline -= 1.8
    writer.write(WHOLE[:-10])
    await until(lambda: connection.deadline - asyncio.get_running_loop().time() > 1)
    since = connection.deadline
    writer.write(WHOLE[-10:-5])
    await asyncio.sleep(0.05)
    assert connection.deadline == since, "bytes one by one give it no more"
    writer.write(WHOLE[-5:])
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_a_request_that_is_half_read_when_the_drain_begins_is_told_to_come_back(rig) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(WHOLE[:-10])
    await until(lambda: any(c._reader.halfway for c in rig.running.public.connections))
    draining = asyncio.create_task(drain(rig.running, asyncio.Queue(), 20))
    await until(lambda: rig.running.public.draining)
    writer.write(WHOLE[-10:])
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nRetry-After: 1\r\n" in answer
    writer.close()
    await draining


@pytest.mark.parametrize("asked", ["page", "engine"])
async def test_a_client_that_asks_on_and_on_and_never_reads_does_not_fill_memory(rig_of, asked) -> None:
    rig = await rig_of({"d": "decode"}, models=["m", *(f"a-long-name-{i}" for i in range(200))])
    rig["d"].script = lambda seen: Script(words=("x" * 50_000,))
    request = WHOLE if asked == "engine" else HEALTH.replace(b"/health", b"/v1/models")
    sock = socket.create_connection(("127.0.0.1", rig.port))
    sock.setblocking(False)
    await until(lambda: bool(rig.running.public.connections))
    (connection,) = rig.running.public.connections
    held = stuck = 0
    while stuck < 20:
        try:
            sock.send(request * 500)
            stuck = 0
        except BlockingIOError:
            stuck += 1  # the gateway reads no more
        await asyncio.sleep(0.02)
        held = max(held, connection._transport.get_write_buffer_size())
    assert held < 2**18
    sock.close()
    await rig.settled()


async def test_a_client_that_reads_at_last_gets_all_that_it_asked_for(rig_of) -> None:
    rig = await rig_of({"d": "decode"}, models=["m", *(f"a-long-name-{i}" for i in range(200))])
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=2**14)
    ask = HEALTH.replace(b"/health", b"/v1/models")
    writer.write(ask * 1999 + ask.replace(b"Host", b"Connection: close\r\nHost"))
    await reader.readline()
    (connection,) = rig.running.public.connections
    await until(lambda: connection._paused)
    answer = await reader.read()
    assert answer.count(b"HTTP/1.1 200 OK") == 1999
    writer.close()


async def test_more_connections_than_allowed_are_turned_away(rig) -> None:
    await rig.http.close()
    held = [await asyncio.open_connection("127.0.0.1", rig.port) for _ in range(3)]
    for reader, writer in held:
        writer.write(HEALTH)
        await reader.readuntil(b"ok\n")
    answer = await rig.raw(HEALTH)
    assert answer.startswith(b"HTTP/1.1 429 ")
    for _, writer in held:
        writer.close()


async def test_a_fault_of_the_gateway_is_an_answer_to_the_client_and_a_traceback_to_the_log(rig) -> None:
    def broken(body: bytes) -> Fields:
        raise ZeroDivisionError

    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    rig.running.gateway._routes[b"/v1/completions"] = Route("completions", broken)
    answer = await rig.completion()
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert [type(complaint["exception"]) for complaint in complaints] == [ZeroDivisionError]
    assert (await rig.chat()).status == 200


async def test_noise_never_breaks_the_gateway(rig) -> None:
    for cut in range(1, len(WHOLE), 7):
        await rig.raw(WHOLE[:cut] + b"\x00" + WHOLE[cut:])
    assert (await rig.chat()).status == 200
