"""Streams: what comes through, who is held back when a client is slow, and how each side's end is told."""

from __future__ import annotations

import asyncio
import itertools
import json
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broadbeam_crds.gateway_config import TimeoutsConfig
from broadbeam_router.events import EventRelay
from broadbeam_router.fake_engine import Script

CHAT = "/v1/chat/completions"
ASK = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
QUICK = TimeoutsConfig(prefill_s=0.5, first_byte_s=0.5, idle_s=0.5)


def ask(**more: object) -> bytes:
    body = json.dumps(ASK | more).encode()
    return b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body)


async def until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not in time")


async def test_events_come_through_as_they_were_and_in_order(rig_of) -> None:
    rig = await rig_of({"d": "decode"})
    words = tuple(f"w{i}" for i in range(300))
    rig["d"].script = lambda seen: Script(words=words)
    answer = await rig.chat(stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.body.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert tuple(json.loads(e[6:])["choices"][0]["delta"]["content"] for e in events[:-2]) == words


async def test_each_event_is_passed_on_when_it_comes(rig_of) -> None:
    rig = await rig_of({"d": "decode"})
    rig["d"].script = lambda seen: Script(gap_s=0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(ask())
    await reader.readuntil(b"Hel")
    assert rig["d"].running == 1, "the engine is still at it"
    await reader.readuntil(b"[DONE]")
    writer.close()


@pytest.mark.parametrize("cut", [None, "half"], ids=["between events", "within an event"])
async def test_a_stream_that_dies_ends_in_an_error_and_no_clean_end(rig_of, cut) -> None:
    rig = await rig_of({"d0": "decode", "d1": "decode"})
    for engine in rig.engines.values():
        engine.script = lambda seen: Script(words=("a", "b", "c"), cut_after=2, cut=cut, gap_s=0.02)
    raw = await rig.raw(ask())
    events = raw.split(b"data: ")[1:]
    assert len(events) == 3
    for event in events[:2]:
        assert json.loads(event.partition(b"\n\n")[0])["choices"]
    error = json.loads(events[2].partition(b"\n\n")[0])["error"]
    assert error["code"] == "stream_broken"
    assert b"[DONE]" not in raw
    assert not raw.endswith(b"0\r\n\r\n"), "the last chunk would say that this was all"
    assert len(rig["d0"].seen) + len(rig["d1"].seen) == 1, "not retried: the client has seen a part"
    assert await rig.metric("broken_streams_total") == 1


async def test_a_silent_stream_is_given_up(rig_of) -> None:
    rig = await rig_of({"d": "decode"}, timeouts=QUICK)
    rig["d"].script = lambda seen: Script(
        raw=b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"9\r\ndata: 1\n\n\r\n"
    )
    raw = await rig.raw(ask())
    assert b"data: 1\n\n" in raw
    assert b"stream_broken" in raw
    assert b"timeout" in raw


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(Script(cut_after=0), id="after the head"),
        pytest.param(Script(cut_after=0, cut="half"), id="within the first event"),
    ],
)
async def test_a_stream_that_dies_before_its_first_event_is_begun_anew(rig_of, script) -> None:
    rig = await rig_of({"p": "prefill", "d0": "decode", "d1": "decode"})
    left = [script]
    play = lambda seen: left.pop() if left else Script()  # noqa: E731
    rig["d0"].script = rig["d1"].script = play
    answer = await rig.chat(stream=True)
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert (len(rig["d0"].seen), len(rig["d1"].seen), len(rig["p"].seen)) == (1, 1, 1)


# -- the client leaves --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_a_client_that_leaves_frees_the_decode_engine(rig_of, stream) -> None:
    rig = await rig_of({"p": "prefill", "d": "decode"})
    rig["d"].script = lambda seen: Script(words=("x",) * 1000, gap_s=0.01, delay_s=0 if stream else 60)
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(ask(stream=stream))
    if stream:
        await reader.readuntil(b"x")
    await until(lambda: rig["d"].running == 1)
    writer.transport.abort()
    await until(lambda: rig["d"].seen[0].ended == "aborted")
    await rig.settled()
    assert await rig.metric("requests_total", route="chat", status="499") == 1


async def test_a_client_that_leaves_frees_an_engine_on_a_kept_connection(rig_of) -> None:
    rig = await rig_of({"d": "decode"})
    assert (await rig.chat()).status == 200
    rig["d"].script = lambda seen: Script(delay_s=60)
    _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(ask(stream=False))
    await until(lambda: rig["d"].running == 1)
    writer.transport.abort()
    await until(lambda: rig["d"].seen[1].ended == "aborted")
    await rig.settled()
    assert rig["d"].accepted == 1
    assert await rig.metric("requests_total", route="chat", status="499") == 1


async def test_a_client_that_leaves_during_prefill_frees_the_prefill_engine(rig_of) -> None:
    rig = await rig_of({"p": "prefill", "d": "decode"})
    rig["p"].script = lambda seen: Script(delay_s=60)
    _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(ask())
    await until(lambda: rig["p"].running == 1)
    writer.close()
    await until(lambda: rig["p"].seen[0].ended == "aborted")
    await rig.settled()
    assert not rig["d"].seen


async def test_a_client_that_leaves_while_connecting_leaks_nothing(rig_of) -> None:
    rig = await rig_of({"d": "decode"})
    for _ in range(50):
        _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(ask())
        writer.transport.abort()
    await rig.settled()
    await until(lambda: rig["d"].running == 0)
    assert (await rig.chat()).status == 200


async def test_a_client_that_leaves_with_requests_in_its_pipeline_leaks_nothing(rig_of) -> None:
    rig = await rig_of({"d": "decode"})
    rig["d"].script = lambda seen: Script(delay_s=0.1)
    _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(ask() * 5)
    await until(lambda: rig["d"].running == 1)
    writer.transport.abort()
    await rig.settled()
    assert len(rig["d"].seen) == 1


# -- a slow client ------------------------------------------------------------------------------------


async def test_a_client_that_does_not_read_holds_the_engine_back(rig_of) -> None:
    rig = await rig_of({"d": "decode"})
    word = "x" * 60_000
    total = 64 * 2**20
    rig["d"].script = lambda seen: Script(words=(word,) * (total // len(word)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=2**16)
    writer.write(ask())
    await reader.readuntil(b"\r\n\r\n")
    connection = next(iter(rig.running.public.connections))
    await until(lambda: connection._transport.get_write_buffer_size() > 0)
    await asyncio.sleep(0.3)
    assert connection._transport.get_write_buffer_size() < 2**20
    assert rig["d"].running == 1, "the engine is held back, not drained into memory"
    read = 0
    while part := await reader.read(2**20):
        read += len(part)
        if b"[DONE]" in part:
            break
    assert read > total * 0.99
    writer.close()
    # The events themselves are made in this process too; only a runaway would double this.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 6 * total / 1024


async def test_a_client_that_never_reads_is_cut_and_the_engine_freed(rig_of) -> None:
    rig = await rig_of({"d": "decode"}, timeouts=QUICK)
    rig["d"].script = lambda seen: Script(words=("x" * 60_000,) * 500)
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=2**16)
    writer.write(ask())
    await reader.readuntil(b"\r\n\r\n")
    await until(lambda: rig["d"].seen[0].ended == "aborted")
    writer.transport.abort()


async def test_a_slow_client_does_not_make_the_engine_look_silent(rig_of) -> None:
    rig = await rig_of({"d": "decode"}, timeouts=TimeoutsConfig(idle_s=0.6))
    rig["d"].script = lambda seen: Script(words=("x" * 60_000,) * 1000)
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=2**16)
    writer.write(ask())
    end = b""
    for _ in range(4):  # the engine is held back for longer than the silence that ends a stream
        await asyncio.sleep(0.4)
        for _ in range(40):
            end = await reader.read(2**17)
            assert end
    while b"[DONE]" not in end:
        part = await reader.read(2**20)
        assert part
        end = end[-100:] + part
    writer.close()
    assert await rig.metric("broken_streams_total") == 0


# -- the relay of events ------------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.ended = False

    def send_part(self, data: bytes) -> None:
        assert data, "an empty chunk would end the body"
        self.parts.append(data)

    def end_stream(self) -> None:
        self.ended = True


@given(
    events=st.lists(st.sampled_from([b"data: a", b": c", b"data: x\ndata: y", b""]), max_size=8),
    end=st.sampled_from([b"\n\n", b"\r\n\r\n"]),
    rest=st.sampled_from([b"", b"data: unfinished"]),
    cuts=st.lists(st.integers(0, 200), max_size=12),
)
def test_parts_end_between_events_however_the_bytes_came(events, end, rest, cuts) -> None:
    stream = b"".join(event + end for event in events) + rest
    client = Recorder()
    relay = EventRelay(client)
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    for start, stop in itertools.pairwise(places):
        relay.deliver(stream[start:stop])
    assert all(part.endswith(end) for part in client.parts)
    relay.finish()
    assert b"".join(client.parts) == stream
    assert client.ended
